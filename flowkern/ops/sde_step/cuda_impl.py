"""The step on the native CUDA kernels (csrc/sde_step): one launch per draw, replay, gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern.ops._common import native, native_cuda
from flowkern.ops._common.arguments import STREAMS, Noise, per_sample_contiguous
from flowkern.ops._common.native import address, latent


def _common(x_t, velocity, x_next, velocity_uncond, guidance_scale, rows) -> tuple:
    """The arguments that all kernels share; `rows` has stride 0 where one edge serves all
    samples.
    """
    batch = x_t.shape[0]
    row_stride = 0 if rows.ndim == 1 else rows.stride(0)
    return (
        native_cuda.queue(x_t), batch, x_t.numel() // batch,
        (latent(x_t), latent(velocity), latent(x_next), latent(velocity_uncond)),
        guidance_scale, rows.data_ptr(), row_stride,
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
    # Bound to names until the kernel is launched: it sees addresses only, and memory that is freed
    # after the launch is used again on the same stream, behind it.
    x_t, velocity, velocity_uncond, noise, *history = map(
        _contiguous, (x_t, velocity, velocity_uncond, source.given, *history)
    )
    rows = rows.contiguous()
    scratch = native_cuda.NO_SCRATCH
    if log_prob is not None:
        scratch = native_cuda.scratch(x_t, *_shape(x_t))
    native.cuda().sde_draw(
        *_common(x_t, velocity, x_next, velocity_uncond, guidance_scale, rows),
        latent(noise), latent(x0), tuple(map(latent, history)),
        native_cuda.key(source, STREAMS["step"]), address(log_prob), scratch,
    )  # fmt: skip


def replay(x_t, velocity, x_next, rows, velocity_uncond, guidance_scale) -> Tensor:
    log_prob = torch.empty(x_t.shape[0], dtype=torch.float32, device=x_t.device)
    if x_t.numel() == 0:
        return log_prob.copy_(rows[..., 4])
    x_t, velocity, x_next, velocity_uncond = map(
        _contiguous, (x_t, velocity, x_next, velocity_uncond)
    )
    rows = rows.contiguous()
    native.cuda().sde_replay(
        *_common(x_t, velocity, x_next, velocity_uncond, guidance_scale, rows),
        log_prob.data_ptr(), native_cuda.scratch(x_t, *_shape(x_t)),
    )  # fmt: skip
    return log_prob


def replay_backward(grad, x_t, velocity, x_next, rows, velocity_uncond, guidance_scale) -> Tensor:
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    if x_t.numel() == 0:
        return grad_velocity
    x_t, velocity, x_next, velocity_uncond = map(
        _contiguous, (x_t, velocity, x_next, velocity_uncond)
    )
    rows = rows.contiguous()
    grad = grad.contiguous()
    native.cuda().sde_replay_backward(
        *_common(x_t, velocity, x_next, velocity_uncond, guidance_scale, rows),
        grad.data_ptr(), latent(grad_velocity),
    )  # fmt: skip
    return grad_velocity


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.numel() // x.shape[0]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else per_sample_contiguous(x)
