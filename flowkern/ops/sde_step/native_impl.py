"""The step on the native kernels (csrc/sde_step)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common import native_calls
from flowkern.ops._common.arguments import Noise

from .inputs import StepInputs


def draw(
    i: StepInputs, source: Noise, x_next: Tensor, log_prob: Tensor | None, x0: Tensor | None
) -> None:
    if i.x_t.numel() == 0:
        if log_prob is not None:
            log_prob.copy_(i.edges[..., 4])
        return
    *inputs, history = i
    written = native_calls.run(
        "sde_draw", *inputs, [*history], *native_calls.noise(source), x_next, None, log_prob, x0
    )
    for out, result in zip((x_next, log_prob, x0), written, strict=True):
        if result is not out:  # a compiler may lay it out in another way: a copy was written
            out.copy_(result)


def replay(x_t, velocity, x_next, edges, velocity_uncond, guidance_scale) -> Tensor:
    if x_t.numel() == 0:
        return torch.empty(x_t.shape[0], dtype=torch.float32, device=x_t.device).copy_(
            edges[..., 4]
        )
    return native_calls.run(
        "sde_replay", x_t, velocity, x_next, edges, velocity_uncond, guidance_scale, False
    )[0]


def replay_backward(
    grad, x_t, velocity, x_next, edges, velocity_uncond, guidance_scale, residual=None
) -> Tensor:
    if x_t.numel() == 0:
        return torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    inputs = (x_t, velocity, x_next, edges, velocity_uncond, guidance_scale)
    return native_calls.run("sde_replay_backward", grad, *inputs, residual)
