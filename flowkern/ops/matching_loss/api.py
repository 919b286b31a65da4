"""Losses on the forward process: no step of the sampler is replayed, only its sample x0 is needed.

    x_t       = (1 - sigma) x0 + sigma noise            (add_noise; the caller's network sees it)
    u         = noise - x0                              (the velocity to match)
    M         = mean_D((velocity - u)^2)
    awm:  l   = -M | -sigma M | -sigma^2 M | -sigma (sqrt(M + 1e-10) - 1e-5)
              | -(sigma / p) ((M + 1e-10)^p - (1e-10)^p)
          r   = exp(l - l_old)                          (in difference form)
          loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    nft:  r   = clip(1/2 + A/2, 0, 1),  plus, minus = old_velocity +- b (velocity - old_velocity)
          loss = 5 sigma^2 / b (r mean((plus - u)^2) / w+ + (1 - r) mean((minus - u)^2) / w-)
          w+-  = max(sigma mean|. - u|, 1e-5), without gradient, | 1
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
from flowkern.ops._common.dispatch import is_tracing, is_transformed, lazily
from flowkern.ops._common.loss_op import LossOp
from flowkern.ops._common.native_calls import direct
from flowkern.ops._common.native_calls import noise as noise_arguments

from . import native_impl, reference
from .inputs import GHUBER_POWER, WEIGHTINGS, MatchingInputs


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


LOSS = LossOp(
    "matching_loss",
    MatchingInputs,
    MatchingLoss,
    native_impl,
    reference.matching_loss,
    slopes=4,
    forward_only=(  # what the gradient takes of these, the slopes have
        "sigma", "advantage", "objective", "weighting", "ghuber_power", "ref_coef", "ema_coef",
        "clip_low", "clip_high", "reduction",
    ),
    kept={
        "old_velocity": lambda i: i.old_velocity if i.objective == "nft" else None,
        "velocity_ref": lambda i: i.velocity_ref if _weighs(i.ref_coef) else None,
        "velocity_ema": lambda i: i.velocity_ema if _weighs(i.ema_coef) else None,
    },
)  # fmt: skip

_ADD_NOISE = {
    "native": native_impl.add_noise,
    "triton": lazily("flowkern.ops.matching_loss.triton_impl", "add_noise"),
    "reference": reference.add_noise,
}


@torch.library.custom_op("flowkern::add_noise", mutates_args=())
def _add_noise_op(
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    sample_id: Tensor | None,
    step: Tensor | None,
    seed: int,
    step_value: int,
    kernel: str,
) -> Tensor:
    return _ADD_NOISE[kernel](x0, sigma, Noise(noise, seed, sample_id, step, step_value))


@_add_noise_op.register_fake
def _(x0, *_) -> Tensor:
    return x0.new_empty(x0.shape)


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
    weighting: str | None = None,
    ghuber_power: float = GHUBER_POWER,
    nft_beta: float = 1.0,
    old_velocity: Tensor | None = None,
    velocity_ref: Tensor | None = None,
    velocity_ema: Tensor | None = None,
    ref_coef: float | Tensor = 0.0,
    ema_coef: float | Tensor = 0.0,
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
        objective: "awm" | "nft". weighting: of awm "uniform" | "t" | "t2" | "huber" | "ghuber"
            (None), of nft "adaptive" (None) | "uniform", without w+-.
        ghuber_power: p of "ghuber", from .01 to 1. nft_beta: nft's b > 0; 1: plus is the velocity.
        old_velocity: (R, *D), of the old policy, at the same noise; None: the detached velocity
            (awm: log_ratio is exactly 0 and keeps its gradient).
        velocity_ref, velocity_ema: (R, *D) anchors, with ref_coef and ema_coef >= 0, floats or
            (B,); a tensor's values are not looked at, on any device.
        clip_low, clip_high: awm's clip range: 0 <= clip_low <= 1, where 1 is no lower clip.
        reduction: "mean" | "sum" | "none". backend: "native" | "triton" | "reference"; None takes
            the best that can serve.

    Raises ValueError, TypeError naming the argument; BackendError where the backend cannot serve.
    """
    if noise is not None and isinstance(step, int) and step == 0:
        step = None  # a default does not go against `noise`
    if weighting is None:
        weighting = "ghuber" if objective == "awm" else "adaptive"
    given = (
        velocity, x0, sigma, advantage, row, noise, seed, sample_id, step, objective, weighting,
        ghuber_power, nft_beta, old_velocity, velocity_ref, velocity_ema, ref_coef, ema_coef,
        clip_low, clip_high, reduction,
    )  # fmt: skip
    return LOSS.straight(backend, given) or LOSS(*_checked(MatchingInputs._make(given)), backend)


def _checked(i: MatchingInputs) -> tuple[MatchingInputs, torch.dtype]:
    """The arguments as implementations take them, and the dtype of the arithmetic."""
    _check_choices(i)
    check_latent("velocity", i.velocity)
    for name in ("old_velocity", "velocity_ref", "velocity_ema"):
        if getattr(i, name) is not None:
            check_latent(name, getattr(i, name), i.velocity)
    row, like = i.row, i.velocity
    if row is not None:
        row = check_index("row", row, like.shape[0], like.device)
        like = like.new_empty(1).expand(row.shape[0], *like.shape[1:])
    check_latent("x0", i.x0, like)
    check_per_sample("advantage", i.advantage, i.x0.shape[0], i.x0.device)
    _check_coefficient("ref_coef", i.ref_coef, "velocity_ref", i)
    _check_coefficient("ema_coef", i.ema_coef, "velocity_ema", i)
    source = check_noise(i.noise, i.seed, i.sample_id, i.step, i.x0)
    noise, seed, sample_id, step = noise_arguments(source)
    dtype = compute_dtype(i.velocity, i.x0, noise, i.old_velocity, i.velocity_ref, i.velocity_ema)
    checked = {"noise": noise, "seed": seed, "sample_id": sample_id, "step": step, "row": row}
    checked |= {"sigma": _per_sample(i.sigma, i.x0, dtype), "advantage": packed(i.advantage, dtype)}
    for name in ("ref_coef", "ema_coef"):
        value = getattr(i, name)
        checked[name] = packed(value, dtype) if isinstance(value, Tensor) else float(value)
    for name in ("ghuber_power", "nft_beta", "clip_low", "clip_high"):
        checked[name] = float(getattr(i, name))
    return i._replace(**checked), dtype


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
    if noise is not None and isinstance(step, int) and step == 0:
        step = None  # as in matching_loss
    if kernels := direct(backend, x0):
        noised = kernels.add_noise(x0, sigma, noise, seed, sample_id, step)
        if noised is not None:
            return noised
    check_latent("x0", x0)
    source = check_noise(noise, seed, sample_id, step, x0)
    dtype = compute_dtype(x0, noise)
    sigma = _per_sample(sigma, x0, dtype)
    kernel = LOSS.best(x0.device, dtype, backend, is_transformed())
    if kernel != "reference" and is_tracing(x0, sigma, *source):
        noise = None if noise is None else noise.detach()
        key = source.sample_id, source.step, source.seed, source.step_value
        return _add_noise_op(x0.detach(), sigma, noise, *key, kernel)
    return _ADD_NOISE[kernel](x0, sigma, source)


# ---- checks ----


def _check_choices(i: MatchingInputs) -> None:
    if i.objective not in ("awm", "nft"):
        raise ValueError(f"objective: expected 'awm' or 'nft', got {i.objective!r}")
    if i.weighting not in (known := WEIGHTINGS[i.objective]):
        raise ValueError(
            f"weighting: expected one of {known} of objective={i.objective!r}, got {i.weighting!r}"
        )
    power = i.ghuber_power
    if not (is_number(power) and 0.01 <= power <= 1):
        raise ValueError(f"ghuber_power: expected a number in [0.01, 1], got {power!r}")
    if power != GHUBER_POWER and i.weighting != "ghuber":
        raise ValueError(f"ghuber_power: {power} is of weighting='ghuber', got {i.weighting!r}")
    if not (is_number(i.nft_beta) and 0 < i.nft_beta < math.inf):
        raise ValueError(f"nft_beta: expected a finite number > 0, got {i.nft_beta!r}")
    if i.nft_beta != 1 and i.objective != "nft":
        raise ValueError(f"nft_beta: {i.nft_beta} is of objective='nft', got {i.objective!r}")
    if i.reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {i.reduction!r}")
    if not (is_number(i.clip_low) and 0 <= i.clip_low <= 1):
        raise ValueError(f"clip_low: expected 0 <= clip_low <= 1, got {i.clip_low!r}")
    if not (is_number(i.clip_high) and i.clip_high >= 0):
        raise ValueError(f"clip_high: expected a number >= 0, got {i.clip_high!r}")


def _weighs(coefficient: float | Tensor) -> bool:
    return isinstance(coefficient, Tensor) or coefficient != 0


def _check_coefficient(
    name: str, value: float | Tensor, anchor: str, inputs: MatchingInputs
) -> None:
    is_each = isinstance(value, Tensor)
    if is_each:
        check_per_sample(name, value, inputs.x0.shape[0], inputs.x0.device)
    elif not (is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number >= 0 or (B,), got {value!r}")
    if getattr(inputs, anchor) is None and _weighs(value):
        shown = "(B,)" if is_each else value
        raise ValueError(f"{anchor}: needed for {name}={shown}, got None")


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
