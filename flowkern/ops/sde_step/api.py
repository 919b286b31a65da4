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
from typing import NamedTuple

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
)
from flowkern.ops._common.autograd import of_both
from flowkern.ops._common.dispatch import choose, is_tracing, is_transformed
from flowkern.ops._common.native_calls import direct
from flowkern.schedules import MAX_HISTORY, Coefficients

from . import operators, reference
from .inputs import FromMean, StepInputs, StepOutputs


class Wanted(NamedTuple):
    """What a draw is asked for: as the arguments of `sde_step` and `ode_step`."""

    out: Tensor | None
    out_dtype: torch.dtype | None
    round_dtype: torch.dtype | None = None
    mean: bool = False
    x0: bool = False


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
    round_dtype: torch.dtype | None = None,
    return_mean: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Draw x_next and its log-probability. x_next has no gradient: training replays.

    Args:
        x_t, velocity: (B, *D), any strides; float32, bfloat16 or float16 (float64: the reference).
        c_rows: one edge for all samples, or B, of `flowkern.schedules`, on the device of x_t.
        noise: (B, *D) standard normals. Or else all of
        seed, sample_id, step: Philox noise drawn in the kernel: 64 bits; (B,) int64 global ids; an
            int or (B,) int64.
        velocity_uncond: (B, *D), with guidance_scale: the step uses uncond + guidance_scale
            (velocity - uncond).
        history: up to three earlier x0 predictions (B, *D), most recent first, for the edges of a
            multistep solver.
        out_dtype: dtype of x_next (that of x_t by default). out: (B, *D), contiguous, written
            instead of a new tensor. It may be x_t, velocity or noise itself (a draw in place), and
            overlaps nothing else that is read.
        round_dtype: what x_next is rounded through before it is stored, in a dtype that holds it.
        return_mean: return the mean, too.
        backend: "native" | "triton" | "reference"; None takes the best that can serve.

    Returns:
        x_next (B, *D); log_prob (B,) float32, of x_next as stored, per element (a mean over D);
        with return_mean also mean (B, *D) float32, and where velocity requires a gradient log_prob
        and mean are then differentiable in it, x_next held fixed.

    Raises:
        ValueError, TypeError: an argument is off; the message names it. BackendError: the backend
            named cannot serve.
    """
    is_plain = not return_mean and round_dtype is None
    if is_plain and (kernels := direct(backend, x_t)):
        drawn = kernels.sde_draw(
            x_t, velocity, c_rows, velocity_uncond, guidance_scale, history,
            noise, seed, sample_id, step, out, out_dtype, True, False,
        )  # fmt: skip
        if drawn is not None:
            if out is not None:
                private.increment_version((out,))
            return drawn[:2]
    inputs = StepInputs(x_t, velocity, c_rows, velocity_uncond, guidance_scale, history)
    given = inputs, (noise, seed, sample_id, step), Wanted(out, out_dtype, round_dtype, return_mean)
    return (_draw if is_plain else _draw_more)(*given, backend)[: 3 if return_mean else 2]


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
    x_next, _, x0, _ = _draw(inputs, None, Wanted(out, out_dtype, x0=return_x0), backend)
    return (x_next, x0) if return_x0 else x_next


def sde_log_prob(
    x_t: Tensor,
    velocity: Tensor,
    x_next: Tensor,
    c_rows: Coefficients,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    uncond_gradient: bool = False,
    return_mean: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of a stored x_next: (B,) float32, differentiable in `velocity`.

    With the velocity of the draw it is the draw's log_prob bit for bit, on the same backend, for
    any split of the batch. Args as `sde_step`; velocity_uncond gets a gradient with
    uncond_gradient only. With return_mean (log_prob, mean), mean (B, *D) float32, both
    differentiable, by one kernel backward.
    d log_prob / d velocity = 2 k b (x_next - mean) / D, d mean / d velocity = b: native kernels
    keep x_next - mean of a float32 velocity, whose memory becomes the gradient; a returned mean is
    kept as it is; else the gradient is computed from the inputs.
    """
    if uncond_gradient:
        velocity, velocity_uncond = of_both(velocity, velocity_uncond, guidance_scale)
    if kernels := direct(backend, x_t):
        inputs = (x_t, velocity, x_next, c_rows, velocity_uncond, guidance_scale)
        if return_mean:
            replayed = kernels.sde_replay_mean(*inputs)
        else:
            replayed = kernels.sde_replay(*inputs, torch.is_grad_enabled())
        if replayed is not None:
            log_prob, kept = replayed
            if not return_mean:
                saved = (x_t, velocity, x_next, c_rows.table, velocity_uncond)
                return operators.with_gradient(log_prob, saved, guidance_scale, "native", kept)
            scale = 1.0 if velocity_uncond is None else guidance_scale
            of = FromMean(x_next, kept, c_rows.table, scale)
            return operators.with_mean(log_prob, velocity, of, "native")
    i = StepInputs(x_t, velocity, c_rows, velocity_uncond, guidance_scale)
    return _replay(i, x_next, return_mean, backend)


def _draw_more(i: StepInputs, key: tuple, wanted: Wanted, backend: str | None) -> tuple:
    """x_next, log_prob and mean (or None), of a draw that keeps it or has a round_dtype."""
    out, out_dtype, round_dtype, mean, _ = wanted
    if kernels := direct(backend, i.x_t):
        more = (True, False, bool(mean), round_dtype)
        drawn = kernels.sde_draw_mean(*i, *key, out, out_dtype, *more)
        if drawn is not None:
            if out is not None:
                private.increment_version((out,))
            x_next, log_prob, _, made = drawn
            if not mean:
                return x_next, log_prob, None
            of = FromMean(x_next, made, i.edges.table, i.scale)
            return x_next, *operators.with_mean(log_prob, i.velocity, of, "native")
    x_next, log_prob, _, made = _draw(i, key, wanted, backend)
    return x_next, log_prob, made


def _replay(i: StepInputs, x_next: Tensor, return_mean: bool, backend: str | None):
    """By the way that checks."""
    if isinstance(i.edges, Coefficients) and i.edges.num_history:
        raise ValueError("c_rows: a replay takes one-step edges, got some with history weights")
    dtype = check_latents(_latents(*i[:2], i.velocity_uncond) | {"x_next": x_next})
    _check_step(i)
    edges = check_edges("c_rows", i.edges, i.x_t.shape[0], i.x_t.device, dtype)
    i = i._replace(edges=edges, guidance_scale=float(i.guidance_scale))
    transformed = is_transformed()
    if is_tracing(i.x_t, i.velocity, x_next, i.velocity_uncond) and not transformed:
        operator = operators.replay_mean_op if return_mean else operators.replay_op
        given = i.x_t, i.velocity, x_next, edges, i.velocity_uncond, i.guidance_scale
        return operator(*given, backend)
    table = operators.REPLAY_MEAN if return_mean else operators.REPLAY
    impl = choose(table, i.x_t.device, dtype, backend, transformed)
    if transformed:  # the reference, which torch differentiates
        return impl.call(_but_for_the_velocity(i), x_next.detach())
    with torch.no_grad():  # the gradient is the kernel's
        replayed = impl.call(i, x_next)
    if not return_mean:
        saved = (i.x_t, i.velocity, x_next, edges, i.velocity_uncond)
        return operators.with_gradient(replayed, saved, i.guidance_scale, impl.name)
    log_prob, mean = replayed
    return operators.with_mean(
        log_prob, i.velocity, FromMean(x_next, mean, edges, i.scale), impl.name
    )


def _but_for_the_velocity(i: StepInputs) -> StepInputs:
    """All other latents held fixed."""
    uncond = None if i.velocity_uncond is None else i.velocity_uncond.detach()
    history = [x.detach() for x in i.history]
    return i._replace(x_t=i.x_t.detach(), velocity_uncond=uncond, history=history)


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


def _check_step(i: StepInputs, name: str = "c_rows") -> None:
    check_guidance(i.velocity_uncond, i.guidance_scale, i.velocity)
    needed = i.edges.num_history if isinstance(i.edges, Coefficients) else 0
    if not needed <= len(i.history) <= MAX_HISTORY:
        raise ValueError(
            f"history: {name} weigh {needed} earlier x0 predictions; "
            f"expected {needed} to {MAX_HISTORY} tensors, got {len(i.history)}"
        )


def _check_output(latents: dict[str, Tensor], wanted: Wanted) -> torch.dtype:
    """Checks the latents and what is to be written; returns the dtype of the arithmetic."""
    out, out_dtype = wanted.out, wanted.out_dtype
    dtype = check_latents(latents if out is None else latents | {"out": out})
    if out is not None:
        if out_dtype is not None and out_dtype != out.dtype:
            raise TypeError(f"out: expected out_dtype {out_dtype}, got {out.dtype}")
    elif out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(
            f"out_dtype: expected float32, bfloat16, float16 or float64, got {out_dtype}"
        )
    return torch.float64 if out_dtype == torch.float64 else dtype


def _rounding(
    round_dtype: torch.dtype | None, stored: torch.dtype, dtype: torch.dtype
) -> torch.dtype | None:
    """A round_dtype that was checked; None where it changes nothing. dtype: of the arithmetic."""
    if round_dtype is None:
        return None
    if round_dtype not in FLOATS:
        raise TypeError(
            f"round_dtype: expected float32, bfloat16, float16 or float64, got {round_dtype}"
        )
    if torch.promote_types(round_dtype, stored) != stored:
        raise ValueError(
            f"round_dtype: x_next is stored in {stored}, which does not hold the values of "
            f"{round_dtype}; expected an out_dtype that does"
        )
    return None if round_dtype in (stored, dtype) else round_dtype


def _draw(
    i: StepInputs, key: tuple | None, wanted: Wanted, backend: str | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x_next, log_prob, x0 and mean, by the way that checks.

    key: noise, seed, sample_id and step; None: the mean alone, without log_prob, of m_rows.
    """
    name = "m_rows" if key is None else "c_rows"
    noise, _, sample_id, step = key or (None,) * 4
    latents = _latents(i.x_t, i.velocity, i.velocity_uncond, i.history, noise)
    dtype = _check_output(latents, wanted)
    _check_step(i, name)
    source = Noise() if key is None else check_noise(*key, i.x_t)
    x_next = wanted.out
    if x_next is not None:
        check_out(x_next, latents, {name: i.edges, "sample_id": sample_id, "step": step})
    batch, device = i.x_t.shape[0], i.x_t.device
    stored = wanted.out_dtype or i.x_t.dtype if x_next is None else x_next.dtype
    round_dtype = _rounding(wanted.round_dtype, stored, dtype)
    edges = check_edges(name, i.edges, batch, device, dtype)
    if x_next is None:
        x_next = torch.empty(i.x_t.shape, dtype=stored, device=device)
    log_prob = None if key is None else torch.empty(batch, dtype=dtype, device=device)
    x0 = torch.empty_like(x_next) if wanted.x0 else None
    mean = torch.empty(i.x_t.shape, dtype=dtype, device=device) if wanted.mean else None
    checked = i._replace(edges=edges, guidance_scale=float(i.guidance_scale))
    out = StepOutputs(x_next, log_prob, x0, mean, round_dtype)
    return _run(checked, source, out, dtype, backend)


def _run(
    i: StepInputs, source: Noise, out: StepOutputs, dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Through the dispatcher where a compiler is to see an operator, else straight."""
    x_next, log_prob, x0, mean, _ = out
    tensors = (i.x_t, i.velocity, i.velocity_uncond, source.given, source.sample_id, x_next)
    transformed = is_transformed()
    if is_tracing(*tensors) and not transformed:
        x_t, velocity, *history = (t.detach() for t in (i.x_t, i.velocity, *i.history))
        uncond = None if i.velocity_uncond is None else i.velocity_uncond.detach()
        inputs = x_t, velocity, i.edges, uncond, i.guidance_scale, history
        operators.draw_op(*inputs, *source, *out, backend)
        if mean is not None and i.velocity.requires_grad and torch.is_grad_enabled():
            given = i.velocity, log_prob, mean, x_next, i.edges, i.scale
            log_prob, mean = operators.attach_op(*given, backend)
        return x_next, log_prob, x0, mean
    impl = choose(operators.DRAW, i.x_t.device, dtype, backend, transformed)
    is_function = transformed and mean is not None  # which torch differentiates
    if is_function:  # before x_t may be overwritten
        mean, _ = reference.mean_and_x0(_but_for_the_velocity(i))
    impl.call(i, source, out._replace(mean=None) if is_function else out)
    torch.autograd.graph.increment_version(x_next)  # a graph that saved it must notice
    if is_function:
        log_prob = reference.log_prob_of(x_next.detach(), mean, i.edges)
    elif mean is not None:
        of = FromMean(x_next, mean, i.edges, i.scale)
        log_prob, mean = operators.with_mean(log_prob, i.velocity, of, impl.name)
    return x_next, log_prob, x0, mean
