"""Clipped importance-ratio loss of SDE steps, from the velocity on.

    d         = b (velocity - old_velocity)                        (= mean - mean_old)
    log_ratio = k mean_D(d (2 (x_next - mean_old) - d))            ratio="sde": no division by std
              = mean_D((x_next - mean_old) d) / std                ratio="guard"
    kl        = mean_D((mean - mean_ref)^2) / (2 std^2)
    policy    = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(log_ratio)
    loss      = step_weight policy + kl_coef kl

B = samples, R = velocity rows (R <= B: siblings share their parent's), D = elements of one latent.
Source: Flow-GRPO (arXiv 2505.05470); guard: GRPO-Guard (arXiv 2510.22319). The ratio is formed from
differences, because log_prob - old_log_prob has float32 steps as large as the clip range.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowkern.ops._common.arguments import (
    check_guidance,
    check_index,
    check_latent,
    check_noise,
    check_per_sample,
    check_rows,
    compute_dtype,
)
from flowkern.ops._common.dispatch import Impl, choose, no_objection
from flowkern.schedules import Coefficients

from . import reference


class PolicyLoss(NamedTuple):
    """loss: (), or (B,) with reduction="none"; differentiable in velocity.

    The rest is (B,) and detached; clipped_low and clipped_high are bool.
    """

    loss: Tensor
    log_ratio: Tensor
    ratio: Tensor
    kl: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def _not_yet(device: torch.device, dtype: torch.dtype) -> str:
    return "policy_loss has no kernel of this backend; the reference serves every device"


_IMPLS = (
    Impl("reference", reference.policy_loss, no_objection),
    Impl("native", None, _not_yet),
    Impl("triton", None, _not_yet),
)


def policy_loss(
    velocity: Tensor,
    x_t: Tensor,
    x_next: Tensor | None,
    c_rows: Coefficients,
    advantage: Tensor,
    row: Tensor | None = None,
    old_velocity: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    sample_id: Tensor | None = None,
    step: int | Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    velocity_ref: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    step_weight: Tensor | None = None,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    ratio: str = "sde",
    reduction: str = "mean",
    backend: str | None = None,
) -> PolicyLoss:
    """Clipped policy loss with its statistics; see the module for the formulas.

    Args:
        velocity, x_t: (R, *D), float32, bfloat16 or float16 (float64: computed in float64).
        x_next: (B, *D). None, with old_velocity and noise or seed, and float32 states: drawn again.
        c_rows: one edge, or B rows, of `flowkern.schedules`.
        advantage: (B,), used as given.
        row: (B,) integers, the velocity row of each sample; None: B == R.
        old_velocity: (R, *D), already guided: the exact difference form.
        old_log_prob: (B,), for recorded log-probabilities: the log-ratio then carries the float32
            rounding of both (about 1e-7). Not with ratio="guard". With neither, the update is on
            policy: log_ratio is exactly 0, its gradient kept.
        noise, seed, sample_id, step: as in `sde_step`, only with x_next=None.
        velocity_uncond: (R, *D), with guidance_scale; it gets no gradient.
        velocity_ref: (R, *D), already guided, of the reference policy. kl_coef: float or (B,).
        step_weight: (B,), multiplies the policy term and never the KL.
        clip_low, clip_high: the clip range; log_ratio is compared with log1p(-clip_low) and
            log1p(clip_high).
        ratio: "sde" | "guard". reduction: "mean" | "sum" | "none". backend: None or "reference".

    Raises:
        ValueError, TypeError naming the argument; BackendError where the named backend cannot
        serve.
    """
    check_latent("velocity", velocity)
    check_latent("x_t", x_t, velocity)
    for name, value in (("old_velocity", old_velocity), ("velocity_ref", velocity_ref)):
        if value is not None:
            check_latent(name, value, velocity)
    check_guidance(velocity_uncond, guidance_scale, velocity)
    _check_choices(ratio, reduction, clip_low, clip_high, old_velocity, old_log_prob)
    rows, device = velocity.shape[0], velocity.device
    if row is not None:
        row = check_index("row", row, rows, device)
    batch = rows if row is None else len(row)
    shape = (batch, *velocity.shape[1:])
    per_sample = {"advantage": advantage, "old_log_prob": old_log_prob, "step_weight": step_weight}
    if isinstance(kl_coef, Tensor):
        per_sample["kl_coef"] = kl_coef
    elif not (isinstance(kl_coef, int | float) and 0 <= kl_coef < math.inf):
        raise ValueError(f"kl_coef: expected a finite number >= 0 or (B,), got {kl_coef!r}")
    for name, value in per_sample.items():
        if value is not None:
            check_per_sample(name, value, batch, device)
    if velocity_ref is None and (isinstance(kl_coef, Tensor) or kl_coef != 0):
        raise ValueError("velocity_ref: needed for a KL (kl_coef is not 0), got None")
    source = _check_x_next(x_next, shape, velocity, x_t, old_velocity, noise, seed, sample_id, step)
    dtype = compute_dtype(velocity, x_t, x_next, old_velocity, velocity_ref, velocity_uncond)
    table = check_rows("c_rows", c_rows, batch, device, dtype)
    if c_rows.num_history:
        raise ValueError(
            "c_rows: rows with history weights are deterministic solver steps and are not trained"
        )
    impl = choose(_IMPLS, device, dtype, backend)
    return PolicyLoss(
        *impl.call(
            velocity, x_t, x_next, table, advantage, row, old_velocity, old_log_prob, source,
            velocity_uncond, guidance_scale, velocity_ref, kl_coef, step_weight,
            clip_low, clip_high, ratio, reduction,
        )
    )  # fmt: skip


def _check_choices(ratio, reduction, clip_low, clip_high, old_velocity, old_log_prob) -> None:
    if ratio not in ("sde", "guard"):
        raise ValueError(f"ratio: expected 'sde' or 'guard', got {ratio!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low: expected 0 <= clip_low < 1, got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high: expected a number >= 0, got {clip_high}")
    if old_log_prob is not None:
        if old_velocity is not None:
            raise ValueError(
                "old_log_prob: given together with old_velocity; expected at most one of them"
            )
        if ratio == "guard":
            raise ValueError(
                "old_log_prob: ratio='guard' is not a function of it; expected old_velocity"
            )


def _check_x_next(x_next, shape, velocity, x_t, old_velocity, noise, seed, sample_id, step):
    """The noise from which x_next is drawn again, or None where x_next is given."""
    like = velocity.new_empty(1).expand(shape)
    if x_next is not None:
        check_latent("x_next", x_next, like)
        extra = {"noise": noise, "seed": seed, "sample_id": sample_id, "step": step}
        given = [name for name, value in extra.items() if value is not None]
        if given:
            raise ValueError(
                f"{given[0]}: given together with x_next; "
                "expected x_next=None where it is to be drawn again"
            )
        return None
    if old_velocity is None:
        raise ValueError("old_velocity: needed to draw x_next again, got None")
    if x_t.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x_next: only float32 states can be drawn again, got x_t of {x_t.dtype}; pass x_next"
        )
    return check_noise(noise, seed, sample_id, step, like)
