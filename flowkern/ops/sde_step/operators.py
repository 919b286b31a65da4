"""The step's implementations, the operators that a compiler sees of them, and their gradients.

The gradient of a replay is made from its inputs, or from the residual that it kept; that of a call
that returns its mean, from the mean: x_t and velocity are not read again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern.ops._common.arguments import Noise, compute_dtype
from flowkern.ops._common.autograd import EagerGradient, plain_gradient
from flowkern.ops._common.dispatch import (
    Impl,
    choose,
    lazily,
    native_why_not,
    no_objection,
    triton_why_not,
)

from . import native_impl, reference
from .inputs import FromMean, StepInputs, StepOutputs

_TRITON = "flowkern.ops.sde_step.triton_impl"


def _implementations(name: str) -> tuple[Impl, ...]:
    return (
        Impl("native", getattr(native_impl, name), native_why_not),
        Impl("triton", lazily(_TRITON, name), triton_why_not),
        Impl("reference", getattr(reference, name), no_objection),
    )


DRAW = _implementations("draw")
REPLAY = _implementations("replay")
REPLAY_MEAN = _implementations("replay_mean")
REPLAY_BACKWARD = _implementations("replay_backward")
MEAN_BACKWARD = _implementations("mean_backward")
GRADIENT = {impl.name: impl.call for impl in REPLAY_BACKWARD}
MEAN_GRADIENT = {impl.name: impl.call for impl in MEAN_BACKWARD}


# ---- operators ----


@torch.library.custom_op("flowkern::sde_draw", mutates_args=("x_next", "log_prob", "x0", "mean"))
def draw_op(
    x_t: Tensor,
    velocity: Tensor,
    edges: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    history: Sequence[Tensor],
    noise: Tensor | None,
    seed: int,
    sample_id: Tensor | None,
    step: Tensor | None,
    step_value: int,
    x_next: Tensor,
    log_prob: Tensor | None,
    x0: Tensor | None,
    mean: Tensor | None,
    round_dtype: torch.dtype | None,
    backend: str | None,
) -> None:
    dtype = compute_dtype(x_t, velocity, velocity_uncond, noise, x_next, x0, *history)
    inputs = StepInputs(x_t, velocity, edges, velocity_uncond, guidance_scale, history)
    source = Noise(noise, seed, sample_id, step, step_value)
    out = StepOutputs(x_next, log_prob, x0, mean, round_dtype)
    choose(DRAW, x_t.device, dtype, backend).call(inputs, source, out)


@draw_op.register_fake
def _(*_) -> None:
    return None


@torch.library.custom_op("flowkern::sde_log_prob", mutates_args=())
def replay_op(
    x_t: Tensor,
    velocity: Tensor,
    x_next: Tensor,
    edges: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str | None,
) -> Tensor:
    dtype = compute_dtype(x_t, velocity, x_next, velocity_uncond)
    inputs = StepInputs(x_t, velocity, edges, velocity_uncond, guidance_scale)
    return choose(REPLAY, x_t.device, dtype, backend).call(inputs, x_next)


@replay_op.register_fake
def _(x_t, velocity, x_next, edges, velocity_uncond, guidance_scale, backend) -> Tensor:
    dtype = compute_dtype(x_t, velocity, x_next, velocity_uncond)
    return x_t.new_empty(x_t.shape[0], dtype=dtype)


@torch.library.custom_op("flowkern::sde_log_prob_backward", mutates_args=())
def _replay_backward_op(
    grad: Tensor,
    x_t: Tensor,
    velocity: Tensor,
    x_next: Tensor,
    edges: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str | None,
) -> Tensor:
    dtype = compute_dtype(x_t, velocity, x_next, velocity_uncond)
    inputs = StepInputs(x_t, velocity, edges, velocity_uncond, guidance_scale)
    return choose(REPLAY_BACKWARD, x_t.device, dtype, backend).call(grad, inputs, x_next)


@_replay_backward_op.register_fake
def _(grad, x_t, velocity, *_) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _save_inputs(ctx, inputs, output) -> None:
    x_t, velocity, x_next, edges, velocity_uncond, ctx.guidance_scale, ctx.backend = inputs
    ctx.save_for_backward(x_t, velocity, x_next, edges, velocity_uncond)


def _backward(ctx, grad: Tensor):
    grad_velocity = None
    if ctx.needs_input_grad[1]:
        grad_velocity = _replay_backward_op(
            grad.contiguous(), *ctx.saved_tensors, ctx.guidance_scale, ctx.backend
        )
    return None, grad_velocity, None, None, None, None, None


replay_op.register_autograd(_backward, setup_context=_save_inputs)


@torch.library.custom_op("flowkern::sde_log_prob_and_mean", mutates_args=())
def replay_mean_op(
    x_t: Tensor,
    velocity: Tensor,
    x_next: Tensor,
    edges: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x_t, velocity, x_next, velocity_uncond)
    inputs = StepInputs(x_t, velocity, edges, velocity_uncond, guidance_scale)
    return choose(REPLAY_MEAN, x_t.device, dtype, backend).call(inputs, x_next)


@replay_mean_op.register_fake
def _(x_t, velocity, x_next, edges, velocity_uncond, guidance_scale, backend):
    dtype = compute_dtype(x_t, velocity, x_next, velocity_uncond)
    return x_t.new_empty(x_t.shape[0], dtype=dtype), x_t.new_empty(x_t.shape, dtype=dtype)


@torch.library.custom_op("flowkern::sde_attach", mutates_args=())
def attach_op(
    velocity: Tensor,
    log_prob: Tensor,
    mean: Tensor,
    x_next: Tensor,
    edges: Tensor,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """What a draw has written, as functions of the velocity: an operator that writes into what it
    is given has no gradient, and none returns what it was given.
    """
    return log_prob.clone(), mean.clone()


@attach_op.register_fake
def _(velocity, log_prob, mean, x_next, edges, scale, backend):
    return torch.empty_like(log_prob), torch.empty_like(mean)


@torch.library.custom_op("flowkern::sde_mean_backward", mutates_args=())
def _mean_backward_op(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    x_next: Tensor,
    mean: Tensor,
    edges: Tensor,
    scale: float,
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    impl = choose(MEAN_BACKWARD, mean.device, mean.dtype, backend)
    return impl.call(grad, grad_mean, FromMean(x_next, mean, edges, scale), dtype)


@_mean_backward_op.register_fake
def _(grad, grad_mean, x_next, mean, edges, scale, dtype, backend) -> Tensor:
    return mean.new_empty(mean.shape, dtype=dtype)


def _save_mean_of_replay(ctx, inputs, output) -> None:
    _, velocity, x_next, edges, velocity_uncond, guidance_scale, ctx.backend = inputs
    scale = 1.0 if velocity_uncond is None else guidance_scale
    _save_mean(ctx, velocity, FromMean(x_next, output[1], edges, scale))


def _save_mean_attached(ctx, inputs, output) -> None:
    velocity, _, _, x_next, edges, scale, ctx.backend = inputs
    _save_mean(ctx, velocity, FromMean(x_next, output[1], edges, scale))


def _save_mean(ctx, velocity: Tensor, of: FromMean) -> None:
    ctx.scale, ctx.dtype = of.scale, velocity.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(of.x_next, of.mean, of.edges)


def _gradient_from_mean(ctx, grad: Tensor | None, grad_mean: Tensor | None) -> Tensor | None:
    if grad is None and grad_mean is None:
        return None
    grad = None if grad is None else grad.contiguous()
    return _mean_backward_op(grad, grad_mean, *ctx.saved_tensors, ctx.scale, ctx.dtype, ctx.backend)


def _backward_of_replay(ctx, grad, grad_mean):
    return None, _gradient_from_mean(ctx, grad, grad_mean), None, None, None, None, None


def _backward_attached(ctx, grad, grad_mean):
    return _gradient_from_mean(ctx, grad, grad_mean), None, None, None, None, None, None


replay_mean_op.register_autograd(_backward_of_replay, setup_context=_save_mean_of_replay)
attach_op.register_autograd(_backward_attached, setup_context=_save_mean_attached)


# ---- without the dispatcher, which costs as much as kernels do at image size ----


def with_gradient(
    log_prob: Tensor,
    saved: tuple,
    guidance_scale: float,
    kernel: str,
    residual: Tensor | None = None,
) -> Tensor:
    """The replay's result with its gradient.

    saved: x_t, velocity, x_next, the edges' table, velocity_uncond. residual: what the replay has
    kept, for the backward pass to write over.
    """
    velocity = saved[1]
    if not (velocity.requires_grad and torch.is_grad_enabled()):
        return log_prob
    how = _gradient, (guidance_scale,), kernel
    return EagerGradient.apply(velocity, (log_prob, saved, how, residual))


def _gradient(
    grad: Tensor, saved: tuple, settings: tuple, kernel: str, residual: Tensor | None
) -> Tensor:
    x_t, velocity, x_next, edges, velocity_uncond = saved
    inputs = StepInputs(x_t, velocity, edges, velocity_uncond, *settings)
    given = () if residual is None else (residual,)  # of the native kernels alone
    return GRADIENT[kernel](grad, inputs, x_next, *given)


class _WithMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, velocity: Tensor, rest: tuple[Tensor, FromMean, str]):
        log_prob, of, ctx.backend = rest
        _save_mean(ctx, velocity, of)
        return log_prob, of.mean

    @staticmethod
    def backward(ctx, *grads):
        given = [None if g is None else plain_gradient(g, ctx.backend) for g in grads]
        of = FromMean(*ctx.saved_tensors, ctx.scale)
        if all(grad is None for grad in given):
            return None, None
        return MEAN_GRADIENT[ctx.backend](*given, of, ctx.dtype), None


def with_mean(
    log_prob: Tensor, velocity: Tensor, of: FromMean, kernel: str
) -> tuple[Tensor, Tensor]:
    """log_prob and mean, with their gradients where the velocity requires one."""
    if not (velocity.requires_grad and torch.is_grad_enabled()):
        return log_prob, of.mean
    return _WithMean.apply(velocity, (log_prob, of, kernel))
