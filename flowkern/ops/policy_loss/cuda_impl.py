"""The policy loss on the native CUDA kernels (csrc/policy_loss): one launch per direction."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common import native, native_cuda
from flowkern.ops._common.arguments import STREAMS, Noise, per_sample_contiguous
from flowkern.ops._common.native import address, latent


def forward(
    velocity, x_t, x_next, rows, advantage, row, old_velocity, old_log_prob, source: Noise | None,
    velocity_uncond, guidance_scale, velocity_ref, kl_coef, kl_value, step_weight,
    clip_low, clip_high, guard, reduction,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, device = advantage.shape[0], velocity.device
    loss = torch.empty(batch if reduction == "none" else (), dtype=torch.float32, device=device)
    slopes = torch.empty((batch, 2), dtype=torch.float32, device=device)
    log_ratio, ratio, kl = (torch.empty_like(advantage) for _ in range(3))
    clipped_low, clipped_high = (torch.empty_like(advantage, dtype=torch.bool) for _ in range(2))
    outputs = (loss, log_ratio, ratio, kl, clipped_low, clipped_high)
    if batch == 0:
        return loss.zero_(), *outputs[1:], slopes
    # Bound to names until the kernel is launched: it sees addresses only.
    latents = _contiguous(
        velocity, x_t, x_next, old_velocity, velocity_uncond, velocity_ref, source
    )
    rows = rows.contiguous()
    module = native.cuda()
    module.policy_forward(
        *_common(latents, batch, guidance_scale, row, rows, source, slopes),
        tuple(map(address, (advantage, old_log_prob, step_weight, kl_coef))), kl_value,
        clip_low, clip_high, guard, reduction == "mean", reduction != "none",
        tuple(map(address, outputs)),
        native_cuda.scratch(velocity, batch, _size(velocity), module.policy_sums),
    )  # fmt: skip
    return *outputs, slopes


def backward(
    grad, slopes, velocity, x_t, x_next, rows, row, old_velocity, source: Noise | None,
    velocity_uncond, guidance_scale, velocity_ref, guard,
) -> Tensor:  # fmt: skip
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    if grad_velocity.numel() == 0:
        return grad_velocity
    latents = _contiguous(
        velocity, x_t, x_next, old_velocity, velocity_uncond, velocity_ref, source
    )
    rows = rows.contiguous()
    native.cuda().policy_backward(
        *_common(latents, len(slopes), guidance_scale, row, rows, source, slopes),
        address(grad), 0 if grad.ndim == 0 else grad.stride(0), guard, latent(grad_velocity),
    )  # fmt: skip
    return grad_velocity


def _contiguous(*tensors_and_source) -> tuple[Tensor | None, ...]:
    """The latents as kernels take them, the noise last."""
    *tensors, source = tensors_and_source
    tensors.append(None if source is None else source.given)
    return tuple(None if x is None else per_sample_contiguous(x) for x in tensors)


def _size(velocity: Tensor) -> int:
    return velocity.numel() // max(1, velocity.shape[0])


def _common(latents, batch, guidance_scale, row, rows, source, slopes) -> tuple:
    """The arguments that both passes share; `rows` has stride 0 where one edge serves all."""
    velocity = latents[0]
    return (
        native_cuda.queue(velocity), velocity.shape[0], batch, _size(velocity),
        tuple(map(latent, latents)), guidance_scale, address(row), rows.data_ptr(),
        0 if rows.ndim == 1 else rows.stride(0), native_cuda.key(source, STREAMS["step"]),
        slopes.data_ptr(),
    )  # fmt: skip
