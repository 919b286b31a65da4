"""What a teacher says is learned, along the samples of the student; rewards are not asked.

P prompts, L leaves of each, C choices that are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowkern.ops.policy_loss import PolicyLoss
from flowkern.rl.advantage import Credit, of_leaves
from flowkern.rl.objectives import Parts, RatioClip
from flowkern.rollout.batches import StepBatch
from flowkern.rollout.engine import Guidance
from flowkern.rollout.plan import Plan
from flowkern.schedules import Coefficients


@dataclass(frozen=True, kw_only=True)
class NoCredit(Credit):
    """Advantage 0 for every choice, whatever its images score, also where they have no score."""

    def __call__(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor:
        prompts = len(scores[next(iter(weights))])
        return of_leaves(torch.zeros(prompts, len(plan.groups), dtype=torch.float64), plan)

    def zero_std_ratio(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> float:
        return 0.0  # no group is to teach anything


@dataclass(frozen=True)
class Distillation(RatioClip):
    """The KL of steps to those of an anchor, mean((mean - mean_anchor)^2) / (2 std^2), with a std
    of 1 where an edge has no noise. For advantages of 0.
    """

    clip_low: float = 0.5
    clip_high: float = 0.5
    kl_coef: float = 1.0
    anchor: str = "teacher"
    anchor_scale: float = 1.0
    """Of the anchor's own guidance, up to 1: none."""

    @property
    def anchor_guidance(self) -> Guidance | None:
        mine = self.guidance
        return None if mine is None else Guidance.of(self.anchor_scale, mine.uncond, mine.guide)

    def _loss(
        self, batch: StepBatch, velocity: Tensor, old_velocity: Tensor | None, **more: Any
    ) -> PolicyLoss:
        c = batch.coefficients
        table = c.table.clone()
        table[..., 2].masked_fill_(c.std == 0, 1.0)
        batch = replace(batch, coefficients=Coefficients(table))
        return super()._loss(batch, velocity, old_velocity, **more)

    def replayed(
        self, batch: StepBatch, velocity: Tensor, guide: Mapping[str, Any]
    ) -> Sequence[Parts]:
        return ()  # no ratio counts
