"""The policy loss on the native CPU kernels (csrc/policy_loss)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common import native
from flowkern.ops._common.arguments import STREAMS, Noise, per_sample_contiguous
from flowkern.ops._common.native import address, latent

_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
_NO_KEY = (0, 0, 0, 0, STREAMS["step"])


def forward(
    velocity, x_t, x_next, rows, advantage, row, old_velocity, old_log_prob, source: Noise | None,
    velocity_uncond, guidance_scale, velocity_ref, kl_coef, kl_value, step_weight,
    clip_low, clip_high, guard, reduction,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch = advantage.shape[0]
    if old_velocity is None and old_log_prob is None:  # on policy: the log-ratio needs no data
        x_t = x_next = None
    latents = _contiguous(
        velocity, x_t, x_next, old_velocity, velocity_uncond, velocity_ref, source
    )
    rows = rows.contiguous()
    loss = torch.empty(batch if reduction == "none" else ())
    log_ratio, ratio, kl = torch.empty(batch), torch.empty(batch), torch.empty(batch)
    clipped_low = torch.empty(batch, dtype=torch.bool)
    clipped_high, slopes = torch.empty_like(clipped_low), torch.empty(batch, 2)
    outputs = (loss, log_ratio, ratio, kl, clipped_low, clipped_high)
    native.cpu().policy_forward(
        *_common(latents, velocity, batch, guidance_scale, row, rows, source, slopes),
        tuple(map(address, (advantage, old_log_prob, step_weight, kl_coef))), kl_value,
        clip_low, clip_high, guard, _REDUCTIONS[reduction], tuple(map(address, outputs)),
    )  # fmt: skip
    return *outputs, slopes


def backward(
    grad, slopes, velocity, x_t, x_next, rows, row, old_velocity, source: Noise | None,
    velocity_uncond, guidance_scale, velocity_ref, guard,
) -> Tensor:  # fmt: skip
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype)
    latents = _contiguous(
        velocity, x_t, x_next, old_velocity, velocity_uncond, velocity_ref, source
    )
    rows = rows.contiguous()
    native.cpu().policy_backward(
        *_common(latents, velocity, len(slopes), guidance_scale, row, rows, source, slopes),
        address(grad), 0 if grad.ndim == 0 else grad.stride(0), guard, latent(grad_velocity),
    )  # fmt: skip
    return grad_velocity


def _contiguous(*tensors_and_source) -> tuple[Tensor | None, ...]:
    """The latents as kernels take them, the noise last; kept by the caller until the kernel
    returns, as it sees addresses only.
    """
    *tensors, source = tensors_and_source
    tensors.append(None if source is None else source.given)
    return tuple(None if x is None else per_sample_contiguous(x) for x in tensors)


def _common(latents, velocity, batch, guidance_scale, row, rows, source, slopes) -> tuple:
    """The arguments that both passes share; `rows` has stride 0 where one edge serves all."""
    count = velocity.shape[0]
    key = _NO_KEY
    if source is not None:
        key = (
            source.seed & (2**64 - 1), address(source.sample_id), address(source.step),
            source.step_value, STREAMS["step"],
        )  # fmt: skip
    return (
        count, batch, velocity.numel() // max(1, count), tuple(map(latent, latents)),
        float(guidance_scale), address(row), rows.data_ptr(),
        0 if rows.ndim == 1 else rows.stride(0), key, slopes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
