"""The step of every sampler of the family, with its log-probability.

    velocity = uncond + guidance_scale (velocity - uncond)
    mean     = a x_t + b velocity + sum_j h_j history_j
    x_next   = mean + std noise                     (rounded to the dtype it is stored in)
    log_prob = mean_D(-k (x_next - mean)^2) + c     (of the x_next that is stored)

B = samples, D = latent elements of one sample. Arithmetic in float32; in float64 where any input is
float64 (reference only). The coefficients are edges of flowkern.schedules.
Source: Flow-GRPO (arXiv 2505.05470) and its relatives; docs/ops/sde_step.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern import torch_private as private
from flowkern.ops._common.arguments import (
    FLOATS,
    Noise,
    check_edges,
    check_guidance,
    check_latents,
    check_noise,
    check_out,
    compute_dtype,
)
from flowkern.ops._common.autograd import EagerGradient, of_both
from flowkern.ops._common.dispatch import (
    Impl,
    choose,
    is_tracing,
    is_transformed,
    lazily,
    native_why_not,
    no_objection,
    triton_why_not,
)
from flowkern.ops._common.native_calls import direct
from flowkern.schedules import MAX_HISTORY, Coefficients

from . import native_impl, reference
from .inputs import StepInputs

_TRITON = "flowkern.ops.sde_step.triton_impl"

_DRAW = (
    Impl("native", native_impl.draw, native_why_not),
    Impl("triton", lazily(_TRITON, "draw"), triton_why_not),
    Impl("reference", reference.draw, no_objection),
)
_REPLAY = (
    Impl("native", native_impl.replay, native_why_not),
    Impl("triton", lazily(_TRITON, "replay"), triton_why_not),
    Impl("reference", reference.replay, no_objection),
)
_REPLAY_BACKWARD = (
    Impl("native", native_impl.replay_backward, native_why_not),
    Impl("triton", lazily(_TRITON, "replay_backward"), triton_why_not),
    Impl("reference", reference.replay_backward, no_objection),
)


_GRADIENT = {impl.name: impl.call for impl in _REPLAY_BACKWARD}


@torch.library.custom_op("flowkern::sde_draw", mutates_args=("x_next", "log_prob", "x0"))
def _draw_op(
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
    backend: str | None,
) -> None:
    dtype = compute_dtype(x_t, velocity, velocity_uncond, noise, x_next, x0, *history)
    inputs = StepInputs(x_t, velocity, edges, velocity_uncond, guidance_scale, history)
    source = Noise(noise, seed, sample_id, step, step_value)
    choose(_DRAW, x_t.device, dtype, backend).call(inputs, source, x_next, log_prob, x0)


@_draw_op.register_fake
def _(*_) -> None:
    return None


@torch.library.custom_op("flowkern::sde_log_prob", mutates_args=())
def _replay_op(
    x_t: Tensor,
    velocity: Tensor,
    x_next: Tensor,
    edges: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    backend: str | None,
) -> Tensor:
    dtype = compute_dtype(x_t, velocity, x_next, velocity_uncond)
    impl = choose(_REPLAY, x_t.device, dtype, backend)
    return impl.call(x_t, velocity, x_next, edges, velocity_uncond, guidance_scale)


@_replay_op.register_fake
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
    impl = choose(_REPLAY_BACKWARD, x_t.device, dtype, backend)
    return impl.call(grad, x_t, velocity, x_next, edges, velocity_uncond, guidance_scale)


@_replay_backward_op.register_fake
def _(grad, x_t, velocity, *_) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _save_inputs(ctx, inputs, output) -> None:
    x_t, velocity, x_next, edges, velocity_uncond, ctx.guidance_scale, ctx.backend = inputs
    ctx.save_for_backward(x_t, velocity, x_next, edges, velocity_uncond)


def _backward(ctx, grad: Tensor):
    x_t, velocity, x_next, edges, velocity_uncond = ctx.saved_tensors
    grad_velocity = None
    if ctx.needs_input_grad[1]:
        grad_velocity = _replay_backward_op(
            grad.contiguous(),
            x_t,
            velocity,
            x_next,
            edges,
            velocity_uncond,
            ctx.guidance_scale,
            ctx.backend,
        )
    return None, grad_velocity, None, None, None, None, None


_replay_op.register_autograd(_backward, setup_context=_save_inputs)


def sde_step(
    x_t: Tensor,
    velocity: Tensor,
    c_rows: Coefficients,
    noise: Tensor | None = None,
    seed: int | None = None,
    sample_id: Tensor | None = None,
    step: int | Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    history: Sequence[Tensor] = (),
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw x_next and its log-probability.

    Not differentiable: training replays with `sde_log_prob`.

    Args:
        x_t, velocity: (B, *D), any strides; float32, bfloat16 or float16 (float64: the reference).
        c_rows: one edge for all samples, or B, of `flowkern.schedules`, on the device of x_t.
        noise: (B, *D) standard normals. Or else all of
        seed, sample_id, step: Philox noise drawn in the kernel: 64 bits; (B,) int64 global ids; an
            int or (B,) int64.
        velocity_uncond: (B, *D), with guidance_scale: the step uses uncond + guidance_scale
            (velocity - uncond).
        history: earlier x0 predictions, most recent first, for the edges of a multistep solver: up
            to three of (B, *D).
        out_dtype: dtype of x_next (that of x_t by default). out: (B, *D), contiguous, written
            instead of a new tensor. It may be x_t, velocity or noise itself (a draw in place), and
            overlaps nothing else that is read.
        backend: "native" | "triton" | "reference"; None takes the best that can serve.

    Returns:
        x_next (B, *D); log_prob (B,) float32, of x_next as stored, per element (a mean over D).

    Raises:
        ValueError, TypeError: an argument is off; the message names it. BackendError: the backend
            named cannot serve.
    """
    if kernels := direct(backend, x_t):
        drawn = kernels.sde_draw(
            x_t, velocity, c_rows, velocity_uncond, guidance_scale, history,
            noise, seed, sample_id, step, out, out_dtype, True, False,
        )  # fmt: skip
        if drawn is not None:
            if out is not None:
                private.increment_version((out,))
            return drawn[:2]
    inputs = StepInputs(x_t, velocity, c_rows, velocity_uncond, guidance_scale, history)
    return _draw(inputs, (noise, seed, sample_id, step), out, out_dtype, backend)[:2]


def ode_step(
    x_t: Tensor,
    velocity: Tensor,
    m_rows: Coefficients,
    history: Sequence[Tensor] = (),
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    return_x0: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mean of the step, by the same kernel: Euler, or a multistep solver with `history`.

    Not differentiable.

    Args as `sde_step`; m_rows from `multistep_coefficients`, `edge_coefficients` or
    `step_coefficients`.

    Returns:
        x_next (B, *D); with return_x0 also x0 = x_t - sigma velocity (B, *D) in the dtype of
        x_next, from the same pass: the next edge's history.
    """
    if kernels := direct(backend, x_t):
        drawn = kernels.sde_draw(
            x_t, velocity, m_rows, velocity_uncond, guidance_scale, history,
            None, None, None, None, out, out_dtype, False, return_x0,
        )  # fmt: skip
        if drawn is not None:
            if out is not None:
                private.increment_version((out,))
            return drawn[::2] if return_x0 else drawn[0]
    inputs = StepInputs(x_t, velocity, m_rows, velocity_uncond, guidance_scale, history)
    x_next, _, x0 = _draw(inputs, None, out, out_dtype, backend, return_x0)
    return (x_next, x0) if return_x0 else x_next


def sde_log_prob(
    x_t: Tensor,
    velocity: Tensor,
    x_next: Tensor,
    c_rows: Coefficients,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    uncond_gradient: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of a stored x_next: (B,) float32, differentiable in `velocity`.

    With the velocity of the draw it is the draw's log_prob bit for bit, on the same backend, for
    any split of the batch. Args as `sde_step`; velocity_uncond gets a gradient with
    uncond_gradient only.
    d log_prob / d velocity = 2 k b (x_next - mean) / D: native kernels keep x_next - mean of a
    float32 velocity, whose memory becomes the gradient; else it is computed from the inputs.
    """
    if uncond_gradient:
        velocity, velocity_uncond = of_both(velocity, velocity_uncond, guidance_scale)
    if kernels := direct(backend, x_t):
        inputs = (x_t, velocity, x_next, c_rows, velocity_uncond, guidance_scale)
        replayed = kernels.sde_replay(*inputs, torch.is_grad_enabled())
        if replayed is not None:
            log_prob, residual = replayed
            saved = (x_t, velocity, x_next, c_rows.table, velocity_uncond)
            return _with_gradient(log_prob, saved, guidance_scale, "native", residual)
    if isinstance(c_rows, Coefficients) and c_rows.num_history:
        raise ValueError("c_rows: a replay takes one-step edges, got some with history weights")
    dtype = check_latents(_latents(x_t, velocity, velocity_uncond) | {"x_next": x_next})
    _check_step(velocity, c_rows, velocity_uncond, guidance_scale, ())
    edges = check_edges("c_rows", c_rows, x_t.shape[0], x_t.device, dtype)
    inputs = (x_t, velocity, x_next, edges, velocity_uncond, float(guidance_scale))
    transformed = is_transformed()
    if is_tracing(x_t, velocity, x_next, velocity_uncond) and not transformed:
        return _replay_op(*inputs, backend)
    impl = choose(_REPLAY, x_t.device, dtype, backend, transformed)
    if transformed:  # the reference, which torch differentiates
        x_t, x_next, uncond = (
            None if x is None else x.detach() for x in (x_t, x_next, velocity_uncond)
        )
        return impl.call(x_t, velocity, x_next, edges, uncond, inputs[-1])
    with torch.no_grad():  # the gradient is the kernel's
        log_prob = impl.call(*inputs)
    return _with_gradient(log_prob, inputs[:-1], inputs[-1], impl.name, None)


def _with_gradient(
    log_prob: Tensor, saved: tuple, guidance_scale: float, kernel: str, residual: Tensor | None
) -> Tensor:
    """The replay's result with its gradient, without the dispatcher: that costs as much as kernels
    do at image size. residual: what the replay has kept, for the backward pass to write over.
    """
    velocity = saved[1]
    if not (velocity.requires_grad and torch.is_grad_enabled()):
        return log_prob
    how = _gradient, (guidance_scale,), kernel
    return EagerGradient.apply(velocity, (log_prob, saved, how, residual))


def _gradient(
    grad: Tensor, saved: tuple, settings: tuple, kernel: str, residual: Tensor | None
) -> Tensor:
    given = () if residual is None else (residual,)  # of the native kernels alone
    return _GRADIENT[kernel](grad, *saved, *settings, *given)


def _latents(x_t, velocity, velocity_uncond, history=(), noise=None) -> dict[str, Tensor]:
    """What has the shape of a latent, by the name an error calls it."""
    latents = {"x_t": x_t, "velocity": velocity}
    if velocity_uncond is not None:
        latents["velocity_uncond"] = velocity_uncond
    if noise is not None:
        latents["noise"] = noise
    if type(history) is not tuple and not isinstance(history, Sequence):
        raise TypeError(f"history: expected a sequence of tensors, got {type(history).__name__}")
    for j, earlier in enumerate(history):
        latents[f"history[{j}]"] = earlier
    return latents


def _check_step(velocity, edges, velocity_uncond, guidance_scale, history, name="c_rows") -> None:
    check_guidance(velocity_uncond, guidance_scale, velocity)
    needed = edges.num_history if isinstance(edges, Coefficients) else 0
    if not needed <= len(history) <= MAX_HISTORY:
        raise ValueError(
            f"history: {name} weigh {needed} earlier x0 predictions; "
            f"expected {needed} to {MAX_HISTORY} tensors, got {len(history)}"
        )


def _check_output(
    latents: dict[str, Tensor], out_dtype: torch.dtype | None, out: Tensor | None
) -> torch.dtype:
    """Checks the latents and what is to be written; returns the dtype of the arithmetic."""
    dtype = check_latents(latents if out is None else latents | {"out": out})
    if out is not None:
        if out_dtype is not None and out_dtype != out.dtype:
            raise TypeError(f"out: expected out_dtype {out_dtype}, got {out.dtype}")
    elif out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(
            f"out_dtype: expected float32, bfloat16, float16 or float64, got {out_dtype}"
        )
    return torch.float64 if out_dtype == torch.float64 else dtype


def _draw(
    i: StepInputs, key: tuple | None, out, out_dtype, backend: str | None, return_x0: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x_next, log_prob and x0, by the way that checks.

    key: noise, seed, sample_id and step; None: the mean alone, without log_prob, of m_rows.
    """
    name = "m_rows" if key is None else "c_rows"
    noise, _, sample_id, step = key or (None,) * 4
    latents = _latents(i.x_t, i.velocity, i.velocity_uncond, i.history, noise)
    dtype = _check_output(latents, out_dtype, out)
    _check_step(i.velocity, i.edges, i.velocity_uncond, i.guidance_scale, i.history, name)
    source = Noise() if key is None else check_noise(*key, i.x_t)
    if out is not None:
        check_out(out, latents, {name: i.edges, "sample_id": sample_id, "step": step})
    batch, device = i.x_t.shape[0], i.x_t.device
    x_next = out
    if out is None:
        x_next = torch.empty(i.x_t.shape, dtype=out_dtype or i.x_t.dtype, device=device)
    log_prob = None if key is None else torch.empty(batch, dtype=dtype, device=device)
    x0 = torch.empty_like(x_next) if return_x0 else None
    edges, scale = check_edges(name, i.edges, batch, device, dtype), float(i.guidance_scale)
    checked = StepInputs(i.x_t, i.velocity, edges, i.velocity_uncond, scale, i.history)
    _run(checked, source, (x_next, log_prob, x0), dtype, backend)
    return x_next, log_prob, x0


def _run(i: StepInputs, source: Noise, out: tuple, dtype: torch.dtype, backend: str | None) -> None:
    """Through the dispatcher where a compiler is to see an operator, else straight."""
    tensors = (i.x_t, i.velocity, i.velocity_uncond, source.given, source.sample_id, out[0])
    transformed = is_transformed()
    if is_tracing(*tensors) and not transformed:
        x_t, velocity, *history = (t.detach() for t in (i.x_t, i.velocity, *i.history))
        uncond = None if i.velocity_uncond is None else i.velocity_uncond.detach()
        _draw_op(x_t, velocity, i.edges, uncond, i.guidance_scale, history, *source, *out, backend)
        return
    choose(_DRAW, i.x_t.device, dtype, backend, transformed).call(i, source, *out)
    torch.autograd.graph.increment_version(out[0])  # a graph that saved it must notice
