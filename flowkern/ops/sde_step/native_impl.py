"""The step on the native CPU kernels (csrc/sde_step)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern.ops._common import native
from flowkern.ops._common.arguments import STREAMS, Noise, per_sample_contiguous
from flowkern.ops._common.native import address, latent


def _common(x_t, velocity, x_next, velocity_uncond, guidance_scale, rows) -> tuple:
    """The arguments that all kernels share; `rows` has stride 0 where one edge serves all
    samples.
    """
    batch = x_t.shape[0]
    row_stride = 0 if rows.ndim == 1 else rows.stride(0)
    return (
        batch, x_t.numel() // batch,
        latent(x_t), latent(velocity), latent(x_next), latent(velocity_uncond),
        float(guidance_scale), rows.data_ptr(), row_stride, torch.get_num_threads(),
    )  # fmt: skip


def draw(
    x_t: Tensor,
    velocity: Tensor,
    rows: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    history: Sequence[Tensor],
    source: Noise,
    x_next: Tensor,
    log_prob: Tensor | None,
    x0: Tensor | None,
) -> None:
    if x_t.numel() == 0:
        if log_prob is not None:
            log_prob.copy_(rows[..., 4])
        return
    # Bound to names until the kernel returns: it sees addresses only.
    x_t, velocity = per_sample_contiguous(x_t), per_sample_contiguous(velocity)
    velocity_uncond, noise = _contiguous(velocity_uncond), _contiguous(source.given)
    history = [per_sample_contiguous(earlier) for earlier in history]
    rows = rows.contiguous()
    native.cpu().sde_draw(
        *_common(x_t, velocity, x_next, velocity_uncond, guidance_scale, rows),
        latent(noise), latent(x0), tuple(map(latent, history)),
        source.seed & (2**64 - 1),
        address(source.sample_id), address(source.step), source.step_value,
        STREAMS["step"], address(log_prob),
    )  # fmt: skip


def replay(x_t, velocity, x_next, rows, velocity_uncond, guidance_scale) -> Tensor:
    log_prob = torch.empty(x_t.shape[0], dtype=torch.float32)
    if x_t.numel() == 0:
        return log_prob.copy_(rows[..., 4])
    x_t, velocity, x_next, velocity_uncond = map(
        _contiguous, (x_t, velocity, x_next, velocity_uncond)
    )
    rows = rows.contiguous()
    native.cpu().sde_replay(
        *_common(x_t, velocity, x_next, velocity_uncond, guidance_scale, rows),
        log_prob.data_ptr(),
    )
    return log_prob


def replay_backward(grad, x_t, velocity, x_next, rows, velocity_uncond, guidance_scale) -> Tensor:
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype)
    if x_t.numel() == 0:
        return grad_velocity
    x_t, velocity, x_next, velocity_uncond = map(
        _contiguous, (x_t, velocity, x_next, velocity_uncond)
    )
    rows = rows.contiguous()
    grad = grad.contiguous()
    native.cpu().sde_replay_backward(
        *_common(x_t, velocity, x_next, velocity_uncond, guidance_scale, rows),
        grad.data_ptr(), latent(grad_velocity),
    )  # fmt: skip
    return grad_velocity


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else per_sample_contiguous(x)
