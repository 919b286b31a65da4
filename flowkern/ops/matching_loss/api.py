"""Losses on the forward process: no step of the sampler is replayed, only its sample x0 is needed.

    x_t       = (1 - sigma) x0 + sigma noise            (add_noise; the caller's network sees it)
    u         = noise - x0                              (the velocity to match)
    M         = mean_D((velocity - u)^2)
    awm:  l   = -M | -sigma M | -(sigma / p) ((M + 1e-10)^p - (1e-10)^p), p = 1/4
          r   = exp(l - l_old)                          (in difference form)
          loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    nft:  r   = clip(1/2 + A/2, 0, 1),  minus = 2 old_velocity - velocity
          loss = 5 sigma^2 (r mean((velocity - u)^2) / w+ + (1 - r) mean((minus - u)^2) / w-)
          w+-  = max(sigma mean|. - u|, 1e-5), without gradient
    both: loss + ref_coef mean((velocity - velocity_ref)^2)
               + ema_coef mean((velocity - velocity_ema)^2)

B = samples, R = velocity rows (R <= B: siblings share one), D = elements of one latent.
Source: AWM (arXiv 2509.25050), DiffusionNFT (arXiv 2509.16117); docs/ops/matching_loss.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowkern.ops._common.arguments import (
    Noise,
    check_fraction,
    check_index,
    check_latent,
    check_noise,
    check_per_sample,
    compute_dtype,
    is_number,
    packed,
)
from flowkern.ops._common.autograd import EagerGradient
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
from flowkern.ops._common.native_calls import as_taken, direct
from flowkern.ops._common.outputs import apart

from . import native_impl, reference
from .reference import WEIGHTINGS

_TRITON = "flowkern.ops.matching_loss.triton_impl"

_IMPLS = (
    Impl("native", native_impl.forward, native_why_not),
    Impl("triton", lazily(_TRITON, "forward"), triton_why_not),
    Impl("reference", reference.matching_loss, no_objection),  # its gradient is autograd's
)
_FORWARD = {impl.name: impl.call for impl in _IMPLS}
_BACKWARD = {
    "native": native_impl.backward,
    "triton": lazily(_TRITON, "backward"),
}
_ADD_NOISE = {
    "native": native_impl.add_noise,
    "triton": lazily(_TRITON, "add_noise"),
}


class MatchingLoss(NamedTuple):
    """loss: (), or (B,) with reduction="none"; differentiable in velocity.

    The rest is (B,) and detached. matching: M for awm, the bracket times sigma^2 for nft. ref, ema:
    mean squared distances to the anchors, 0 where absent. clipped_low, clipped_high: bool.
    """

    loss: Tensor
    log_ratio: Tensor
    ratio: Tensor
    matching: Tensor
    ref: Tensor
    ema: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


# ---- the kernels as ops and as an autograd function ----


def _forward(
    velocity: Tensor, x0: Tensor, sigma: Tensor, advantage: Tensor, row: Tensor | None,
    noise: Tensor | None, sample_id: Tensor | None, step: Tensor | None,
    old_velocity: Tensor | None, velocity_ref: Tensor | None, velocity_ema: Tensor | None,
    seed: int, step_value: int, nft: bool, weighting: int, ref_coef: float, ema_coef: float,
    clip_low: float, clip_high: float, reduction: str, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of MatchingLoss, and the slopes (B, 4) that the backward pass multiplies."""
    return _FORWARD[kernel](
        velocity, x0, sigma, advantage, row, Noise(noise, seed, sample_id, step, step_value),
        nft, weighting, old_velocity, velocity_ref, velocity_ema,
        ref_coef, ema_coef, clip_low, clip_high, reduction,
    )  # fmt: skip


def _backward(
    grad: Tensor, slopes: Tensor, velocity: Tensor, x0: Tensor, sigma: Tensor, row: Tensor | None,
    noise: Tensor | None, sample_id: Tensor | None, step: Tensor | None,
    old_velocity: Tensor | None, velocity_ref: Tensor | None, velocity_ema: Tensor | None,
    seed: int, step_value: int, nft: bool, kernel: str,
) -> Tensor:  # fmt: skip
    source = Noise(noise, seed, sample_id, step, step_value)
    return _BACKWARD[kernel](
        grad, slopes, velocity, x0, sigma, row, source, nft,
        old_velocity, velocity_ref, velocity_ema,
    )  # fmt: skip


def _backward_over(
    residual, grad, slopes, velocity, x0, sigma, row, noise, sample_id, step,
    old_velocity, velocity_ref, velocity_ema, seed, step_value, nft, kernel,
) -> Tensor:  # fmt: skip
    """`_backward` over the residual that the CPU's kernel has kept, in its memory."""
    return native_impl.backward(
        grad, slopes, velocity, x0, sigma, row, Noise(noise, seed, sample_id, step, step_value),
        nft, old_velocity, velocity_ref, velocity_ema, residual,
    )  # fmt: skip


def _add_noise(
    x0: Tensor, sigma: Tensor, noise: Tensor | None, sample_id: Tensor | None,
    step: Tensor | None, seed: int, step_value: int, kernel: str,
) -> Tensor:  # fmt: skip
    return _ADD_NOISE[kernel](x0, sigma, Noise(noise, seed, sample_id, step, step_value))


_forward_op = torch.library.custom_op("flowkern::matching_loss", apart(_forward), mutates_args=())
_backward_op = torch.library.custom_op(
    "flowkern::matching_loss_backward", _backward, mutates_args=()
)
_add_noise_op = torch.library.custom_op("flowkern::add_noise", _add_noise, mutates_args=())


@_forward_op.register_fake
def _(velocity, x0, sigma, *rest):
    loss = sigma.new_empty(sigma.shape if rest[-2] == "none" else ())
    statistics = [torch.empty_like(sigma) for _ in range(5)]
    clipped = [torch.empty_like(sigma, dtype=torch.bool) for _ in range(2)]
    return loss, *statistics, *clipped, sigma.new_empty((*sigma.shape, 4))


@_backward_op.register_fake
def _(grad, slopes, velocity, *_) -> Tensor:
    return velocity.new_empty(velocity.shape)


@_add_noise_op.register_fake
def _(x0, *_) -> Tensor:
    return x0.new_empty(x0.shape)


def _kept(
    slopes, velocity, x0, sigma, row, source: Noise, old_velocity, velocity_ref, velocity_ema,
    ref_coef, ema_coef, nft, kernel,
) -> tuple[tuple, tuple]:  # fmt: skip
    """What `_backward` takes after the gradient: tensors, and settings. They are inputs, but for
    four slopes per sample: neither awm's old velocity nor an anchor that pulls at nothing.
    """
    tensors = (
        slopes, velocity, x0, sigma, row, source.given, source.sample_id, source.step,
        old_velocity if nft else None, velocity_ref if ref_coef else None,
        velocity_ema if ema_coef else None,
    )  # fmt: skip
    return tensors, (source.seed, source.step_value, nft, kernel)


def _set_up(ctx, inputs, output) -> None:
    velocity, x0, sigma, _, row, noise, sample_id, step, *anchors = inputs[:11]
    seed, step_value, nft, _, ref_coef, ema_coef, *_, kernel = inputs[11:]
    source = Noise(noise, seed, sample_id, step, step_value)
    tensors, ctx.settings = _kept(
        output[-1], velocity, x0, sigma, row, source, *anchors, ref_coef, ema_coef, nft, kernel
    )
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])


_forward_op.register_autograd(
    lambda ctx, grad, *_: (_backward_op(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 20),
    setup_context=_set_up,
)


# ---- the verbs ----


def matching_loss(
    velocity: Tensor,
    x0: Tensor,
    sigma: float | Tensor,
    advantage: Tensor,
    row: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    sample_id: Tensor | None = None,
    step: int | Tensor = 0,
    objective: str = "awm",
    weighting: str = "ghuber",
    old_velocity: Tensor | None = None,
    velocity_ref: Tensor | None = None,
    velocity_ema: Tensor | None = None,
    ref_coef: float = 0.0,
    ema_coef: float = 0.0,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> MatchingLoss:
    """Loss of a velocity at (add_noise(x0, sigma, ...), sigma); see the module for the formulas.

    Args:
        velocity: (R, *D), float32, bfloat16 or float16 (float64: computed in float64); the only
            argument with a gradient.
        x0: (B, *D) clean samples.
        sigma: the noise level, a float or (B,), in [0, 1]; values are looked at on the CPU only.
        advantage: (B,), used as given: in [-1, 1] by convention (clamped at 5, divided by 5); what
            nft gets beyond that is cut.
        row: (B,) integers, the velocity row of each sample; None: B == R.
        noise: (B, *D), as given to add_noise. Or else
        seed, sample_id, step: the key of Philox stream "match": the noise is drawn again.
        objective: "awm" | "nft". weighting: "uniform" | "t" | "ghuber", of awm, as the clip range.
        old_velocity: (R, *D), of the old policy, at the same noise; None: the detached velocity
            (awm: log_ratio is exactly 0 and keeps its gradient).
        velocity_ref, velocity_ema: (R, *D) anchors, with ref_coef and ema_coef >= 0.
        clip_low, clip_high: awm's clip range: 0 <= clip_low <= 1, where 1 is no lower clip.
        reduction: "mean" | "sum" | "none". backend: "native" | "triton" | "reference"; None takes
            the best that can serve.

    Raises:
        ValueError, TypeError naming the argument; BackendError where the named backend cannot
        serve.
    """
    nft, anchors = objective == "nft", (old_velocity, velocity_ref, velocity_ema)
    if kernels := direct(backend, velocity):
        if noise is not None and type(step) is int and step == 0:
            step = None  # a default does not go against `noise`
        output = kernels.matching_forward(
            velocity, x0, sigma, advantage, row, noise, seed, sample_id, step,
            objective, weighting, *anchors, ref_coef, ema_coef, clip_low, clip_high, reduction,
            torch.is_grad_enabled(),
        )  # fmt: skip
        if output is not None:
            *output, residual = output
            source = as_taken(noise, seed, sample_id, step)
            return _with_gradient(
                output, residual, velocity, x0, None, row, source, *anchors, ref_coef, ema_coef,
                nft, "native",
            )  # fmt: skip  # no sigma: the slopes have it
    _check_choices(objective, weighting, reduction, clip_low, clip_high)
    check_latent("velocity", velocity)
    for name, value in zip(
        ("old_velocity", "velocity_ref", "velocity_ema"),
        (old_velocity, velocity_ref, velocity_ema),
        strict=True,
    ):
        if value is not None:
            check_latent(name, value, velocity)
    _check_coefficient("ref_coef", ref_coef, "velocity_ref", velocity_ref)
    _check_coefficient("ema_coef", ema_coef, "velocity_ema", velocity_ema)
    like = velocity
    if row is not None:
        row = check_index("row", row, velocity.shape[0], velocity.device)
        like = velocity.new_empty(1).expand(row.shape[0], *velocity.shape[1:])
    check_latent("x0", x0, like)
    check_per_sample("advantage", advantage, x0.shape[0], x0.device)
    source = _check_noise(noise, seed, sample_id, step, x0)
    dtype = compute_dtype(velocity, x0, noise, old_velocity, velocity_ref, velocity_ema)
    sigma, advantage = _per_sample(sigma, x0, dtype), packed(advantage, dtype)
    coefficients = (float(ref_coef), float(ema_coef), float(clip_low), float(clip_high), reduction)
    kernel = _best(velocity.device, dtype, backend, is_transformed())
    if kernel == "reference":
        inputs = (velocity, x0, sigma, advantage, row, source, nft, weighting, *anchors)
        return MatchingLoss(*reference.matching_loss(*inputs, *coefficients))
    others = (
        x0, sigma, advantage, row, source.given, source.sample_id, source.step, *anchors,
        source.seed, source.step_value, nft, WEIGHTINGS.index(weighting), *coefficients, kernel,
    )  # fmt: skip
    if is_tracing(velocity, *others[:10]):
        others = [x.detach() if isinstance(x, Tensor) else x for x in others]
        output = _forward_op(velocity, *others)
        return MatchingLoss(*output[:-1])
    output = _forward(velocity, *others)
    return _with_gradient(
        output, None, velocity, x0, sigma, row, source, *anchors, ref_coef, ema_coef, nft, kernel
    )


def _with_gradient(output, residual, velocity, *kept) -> MatchingLoss:
    """A kernel's output, the residual it has kept or None, and what `_kept` takes."""
    loss, *statistics, slopes = output
    if velocity.requires_grad and torch.is_grad_enabled():
        tensors, settings = _kept(slopes, velocity, *kept)
        over = None if residual is None else (residual, _backward_over)
        loss = EagerGradient.apply(velocity, tensors, (loss, _backward, settings, kept[-1]), over)
    return MatchingLoss(loss, *statistics)


def add_noise(
    x0: Tensor,
    sigma: float | Tensor,
    noise: Tensor | None = None,
    seed: int | None = None,
    sample_id: Tensor | None = None,
    step: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma noise, in float32, rounded to the dtype of x0: (B, *D).

    The noise is that of `matching_loss` with the same noise, or seed, sample_id and step: it need
    not be stored. Not differentiable. Args as `matching_loss`.
    """
    if kernels := direct(backend, x0):
        unset = noise is not None and type(step) is int and step == 0  # as in matching_loss
        noised = kernels.add_noise(x0, sigma, noise, seed, sample_id, None if unset else step)
        if noised is not None:
            return noised
    check_latent("x0", x0)
    source = _check_noise(noise, seed, sample_id, step, x0)
    dtype = compute_dtype(x0, noise)
    sigma = _per_sample(sigma, x0, dtype)
    kernel = _best(x0.device, dtype, backend, is_transformed())
    if kernel == "reference":
        return reference.add_noise(x0, sigma, source)
    key = (source.sample_id, source.step, source.seed, source.step_value)
    arguments = (x0.detach(), sigma, None if noise is None else noise.detach(), *key, kernel)
    if is_tracing(x0, sigma, noise, source.sample_id, source.step):
        return _add_noise_op(*arguments)
    return _add_noise(*arguments)


def _best(device: torch.device, dtype: torch.dtype, backend: str | None, transformed: bool) -> str:
    """The name of the implementation; compilers take it as it is."""
    return choose(_IMPLS, device, dtype, backend, transformed).name


# What torch.compiler.assume_constant_result sets; calling that imports the compiler, and triton.
_best._dynamo_marked_constant = True


# ---- checks ----


def _check_choices(objective, weighting, reduction, clip_low, clip_high) -> None:
    if objective not in ("awm", "nft"):
        raise ValueError(f"objective: expected 'awm' or 'nft', got {objective!r}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {WEIGHTINGS}, got {weighting!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if not (is_number(clip_low) and 0 <= clip_low <= 1):
        raise ValueError(f"clip_low: expected 0 <= clip_low <= 1, got {clip_low!r}")
    if not (is_number(clip_high) and clip_high >= 0):
        raise ValueError(f"clip_high: expected a number >= 0, got {clip_high!r}")


def _check_coefficient(name: str, value: float, anchor_name: str, anchor: Tensor | None) -> None:
    if not (is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    if anchor is None and value != 0:
        raise ValueError(f"{anchor_name}: needed for {name}={value}, got None")


def _check_noise(noise, seed, sample_id, step, x0: Tensor) -> Noise:
    """As check_noise, where step has a default: left at 0, it does not go against `noise`."""
    if noise is not None and isinstance(step, int) and step == 0:
        step = None
    return check_noise(noise, seed, sample_id, step, x0)


def _per_sample(sigma: float | Tensor, x0: Tensor, dtype: torch.dtype) -> Tensor:
    """sigma as (B,) of the arithmetic's dtype."""
    if isinstance(sigma, Tensor):
        if sigma.ndim == 0:
            sigma = sigma.expand(x0.shape[0])
        check_per_sample("sigma", sigma, x0.shape[0], x0.device)
        check_fraction("sigma", sigma)
        return packed(sigma, dtype)
    if not (is_number(sigma) and 0 <= sigma <= 1):
        raise ValueError(f"sigma: expected a number in [0, 1] or (B,), got {sigma!r}")
    return torch.full((x0.shape[0],), float(sigma), dtype=dtype, device=x0.device)
