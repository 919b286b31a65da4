"""The step on the native kernels (csrc/sde_step)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common import native_calls
from flowkern.ops._common.arguments import Noise

from .inputs import FromMean, StepInputs, StepOutputs


def draw(i: StepInputs, source: Noise, out: StepOutputs) -> None:
    if i.x_t.numel() == 0:
        if out.log_prob is not None:
            out.log_prob.copy_(i.edges[..., 4])
        return
    *inputs, history = i
    x_next, log_prob, x0, mean, round_dtype = out
    given = [*inputs, [*history], *native_calls.noise(source), x_next, None, log_prob, x0]
    wanted = [x_next, log_prob, x0]
    if mean is None and round_dtype is None:
        written = native_calls.run("sde_draw", *given)
    else:
        written = native_calls.run("sde_draw_mean", *given, mean, round_dtype)
        wanted.append(mean)
    for result, tensor in zip(written, wanted, strict=True):
        if result is not tensor:  # a compiler may lay it out in another way: a copy was written
            tensor.copy_(result)


def replay(i: StepInputs, x_next: Tensor) -> Tensor:
    if i.x_t.numel() == 0:
        return _log_prob_of_nothing(i)
    x_t, velocity, *rest, _ = i
    return native_calls.run("sde_replay", x_t, velocity, x_next, *rest, False)[0]


def replay_mean(i: StepInputs, x_next: Tensor) -> tuple[Tensor, Tensor]:
    if i.x_t.numel() == 0:
        nothing = torch.empty(i.x_t.shape, dtype=torch.float32, device=i.x_t.device)
        return _log_prob_of_nothing(i), nothing
    x_t, velocity, *rest, _ = i
    return native_calls.run("sde_replay_mean", x_t, velocity, x_next, *rest)


def _log_prob_of_nothing(i: StepInputs) -> Tensor:
    log_prob = torch.empty(i.x_t.shape[0], dtype=torch.float32, device=i.x_t.device)
    return log_prob.copy_(i.edges[..., 4])


def replay_backward(
    grad: Tensor, i: StepInputs, x_next: Tensor, residual: Tensor | None = None
) -> Tensor:
    x_t, velocity, *rest, _ = i
    if x_t.numel() == 0:
        return torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    return native_calls.run("sde_replay_backward", grad, x_t, velocity, x_next, *rest, residual)


def mean_backward(
    grad: Tensor | None, grad_mean: Tensor | None, of: FromMean, dtype: torch.dtype
) -> Tensor:
    if of.mean.numel() == 0:
        return torch.empty(of.mean.shape, dtype=dtype, device=of.mean.device)
    x_next, mean, edges, scale = of
    return native_calls.run("sde_mean_backward", mean, x_next, grad, grad_mean, edges, scale, dtype)
