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
    check_edges,
    check_guidance,
    check_index,
    check_latent,
    check_latents,
    check_noise,
    check_per_sample,
    compute_dtype,
    is_number,
    packed,
)
from flowkern.ops._common.autograd import of_both
from flowkern.ops._common.loss_op import LossOp
from flowkern.ops._common.native_calls import noise as noise_arguments
from flowkern.schedules import Coefficients

from . import native_impl, reference
from .inputs import PolicyInputs


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


LOSS = LossOp(
    "policy_loss",
    PolicyInputs,
    PolicyLoss,
    native_impl,
    reference.policy_loss,
    slopes=2,
    forward_only=(
        "advantage", "old_log_prob", "kl_coef", "step_weight", "clip_low", "clip_high", "reduction",
    ),
    kept={
        "c_rows": lambda i: i.c_rows.table if isinstance(i.c_rows, Coefficients) else i.c_rows,
        # The gradient of a given x_next's sde ratio has none, and without a KL there is no anchor.
        "old_velocity": lambda i: (
            i.old_velocity if i.ratio == "guard" or i.x_next is None else None
        ),
        "velocity_ref": lambda i: i.velocity_ref if i.has_kl else None,
    },
)  # fmt: skip


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
    uncond_gradient: bool = False,
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
        x_next: (B, *D). None, with old_velocity and noise or seed, and float32 states: drawn again,
            which is the x_next of the rollout only where that was stored in float32.
        c_rows: one edge for all samples, or B, of `flowkern.schedules`.
        advantage: (B,), used as given.
        row: (B,) integers, the velocity row of each sample; None: B == R.
        old_velocity: (R, *D), already guided (in float32, from the same tensors: rounded to
            bfloat16 it moves the ratio more than a clip range): the exact difference form.
        old_log_prob: (B,), for recorded log-probabilities: the log-ratio then carries the float32
            rounding of both (about 1e-7). Not with ratio="guard". With neither, the update is on
            policy: log_ratio is exactly 0, its gradient kept.
        noise, seed, sample_id, step: as in `sde_step`, only with x_next=None.
        velocity_uncond: (R, *D), with guidance_scale; uncond_gradient: it has one too, as in
            DanceGRPO and Flow-Factory; in Flow-GRPO it is a constant.
        velocity_ref: (R, *D), already guided, of the reference policy. kl_coef: >= 0, a float or
            (B,), whose values are not looked at.
        step_weight: (B,), multiplies the policy term and never the KL.
        clip_low, clip_high: the clip range; log_ratio is compared with log1p(-clip_low) and
            log1p(clip_high).
        ratio: "sde" | "guard". reduction: "mean" | "sum" | "none".
        backend: "native" | "triton" | "reference"; None takes the best that can serve.

    Raises ValueError, TypeError naming the argument; BackendError where the backend cannot serve.
    """
    if uncond_gradient:
        velocity, velocity_uncond = of_both(velocity, velocity_uncond, guidance_scale)
    given = (
        velocity, x_t, x_next, c_rows, advantage, row, old_velocity, old_log_prob,
        noise, seed, sample_id, step, velocity_uncond, guidance_scale, velocity_ref,
        kl_coef, step_weight, clip_low, clip_high, ratio, reduction,
    )  # fmt: skip
    return LOSS.straight(backend, given) or LOSS(*_checked(PolicyInputs._make(given)), backend)


def _checked(i: PolicyInputs) -> tuple[PolicyInputs, torch.dtype]:
    """The arguments as implementations take them, and the dtype of the arithmetic."""
    latents = {"velocity": i.velocity, "x_t": i.x_t}
    for name in ("old_velocity", "velocity_ref", "velocity_uncond"):
        if getattr(i, name) is not None:
            latents[name] = getattr(i, name)
    dtype = check_latents(latents)
    check_guidance(i.velocity_uncond, i.guidance_scale, i.velocity)
    _check_choices(i)
    (rows, *sizes), device = i.velocity.shape, i.velocity.device
    row = i.row if i.row is None else check_index("row", i.row, rows, device)
    batch = rows if row is None else len(row)
    kl_coef = _check_kl(i, batch, device)
    check_per_sample("advantage", i.advantage, batch, device)
    for name, value in (("old_log_prob", i.old_log_prob), ("step_weight", i.step_weight)):
        if value is not None:
            check_per_sample(name, value, batch, device)
    noise, seed, sample_id, step = _check_x_next(i, (batch, *sizes))
    if compute_dtype(i.x_next, noise) == torch.float64:
        dtype = torch.float64
    c_rows = check_edges("c_rows", i.c_rows, batch, device, dtype)
    if i.c_rows.num_history:
        raise ValueError(
            "c_rows: edges with history weights are deterministic solver steps and are not trained"
        )
    advantage, old_log_prob, kl_coef, step_weight = (
        packed(x, dtype) if isinstance(x, Tensor) else x
        for x in (i.advantage, i.old_log_prob, kl_coef, i.step_weight)
    )
    checked = PolicyInputs(
        i.velocity, i.x_t, i.x_next, c_rows, advantage, row, i.old_velocity, old_log_prob,
        noise, seed, sample_id, step, i.velocity_uncond, float(i.guidance_scale), i.velocity_ref,
        kl_coef, step_weight, float(i.clip_low), float(i.clip_high), i.ratio, i.reduction,
    )  # fmt: skip
    return checked, dtype


def _check_kl(i: PolicyInputs, batch: int, device: torch.device) -> float | Tensor:
    kl_coef = i.kl_coef
    is_tensor = isinstance(kl_coef, Tensor)
    if not is_tensor and not (is_number(kl_coef) and 0 <= kl_coef < math.inf):
        raise ValueError(f"kl_coef: expected a finite number >= 0 or (B,), got {kl_coef!r}")
    if i.velocity_ref is None and i.has_kl:
        raise ValueError("velocity_ref: needed for a KL (kl_coef is not 0), got None")
    if not is_tensor:
        return float(kl_coef)
    check_per_sample("kl_coef", kl_coef, batch, device)
    return kl_coef


def _check_choices(i: PolicyInputs) -> None:
    if i.ratio not in ("sde", "guard"):
        raise ValueError(f"ratio: expected 'sde' or 'guard', got {i.ratio!r}")
    if i.reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {i.reduction!r}")
    for name, value in (("clip_low", i.clip_low), ("clip_high", i.clip_high)):
        if not (is_number(value) and value >= 0):
            raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
    if i.clip_low >= 1:
        raise ValueError(f"clip_low: expected 0 <= clip_low < 1, got {i.clip_low}")
    if i.old_log_prob is not None and i.old_velocity is not None:
        raise ValueError(
            "old_log_prob: given together with old_velocity; expected at most one of them"
        )
    if i.old_log_prob is not None and i.ratio == "guard":
        raise ValueError(
            "old_log_prob: ratio='guard' is not a function of it; expected old_velocity"
        )


def _check_x_next(i: PolicyInputs, shape: tuple[int, ...]) -> tuple:
    """(noise, seed, sample_id, step) from which x_next is drawn again; none of them where it is
    given.
    """
    like = i.velocity if shape == i.velocity.shape else i.velocity.new_empty(1).expand(shape)
    source = {"noise": i.noise, "seed": i.seed, "sample_id": i.sample_id, "step": i.step}
    if i.x_next is not None:
        check_latent("x_next", i.x_next, like)
        given = [name for name, value in source.items() if value is not None]
        if given:
            raise ValueError(
                f"{given[0]}: given together with x_next; "
                "expected x_next=None where it is to be drawn again"
            )
        return None, None, None, None
    if i.old_velocity is None:
        raise ValueError("old_velocity: needed to draw x_next again, got None")
    if i.x_t.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x_next: only float32 states can be drawn again, got x_t of {i.x_t.dtype}; pass x_next"
        )
    return noise_arguments(check_noise(*source.values(), like))
