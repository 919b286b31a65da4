"""An objective without a clip range: what has moved too far, by its KL, is dropped instead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkern.ops.policy_loss import PolicyLoss
from flowkern.rl.objectives import RatioClip
from flowkern.rollout.batches import StepBatch


@dataclass(frozen=True)
class DivergenceMask(RatioClip):
    """The likelihood ratio of drawn edges. A choice is dropped whose step has a KL to the policy
    that sampled of `kl_mask_threshold` or more, and whose advantage moves it further away: a
    positive one with a ratio above 1, or a negative one with a ratio below 1.

    The KL is the step's own Gaussians', a mean over the elements: mean((mean - mean_old)^2) / (2
    std^2). In the statistics what is dropped counts as clipped.
    """

    clip_low: float = 1 - 1e-9
    """So far off that nothing is clipped: what is left of a gradient there is its billionth."""
    clip_high: float = 1e30
    kl_mask_threshold: float = 1e-5

    def least_clipped(self, elements: int) -> float:
        """The spread of the log-ratio where the KL is at the threshold."""
        return math.sqrt(2 * self.kl_mask_threshold / elements)

    @property
    def bound(self) -> str:
        return "the log ratio's spread at kl_mask_threshold"

    def _loss(
        self, batch: StepBatch, velocity: Tensor, old_velocity: Tensor | None, **more: Any
    ) -> PolicyLoss:
        if old_velocity is None:  # nothing has moved
            return super()._loss(batch, velocity, None, **more)
        guide = {name: more[name] for name in ("velocity_uncond", "guidance_scale") if name in more}
        with torch.no_grad():
            seen = super()._loss(batch, velocity, old_velocity, velocity_ref=old_velocity, **guide)
        is_far = seen.kl >= self.kl_mask_threshold
        higher = is_far & (seen.log_ratio > 0) & (batch.advantage > 0)
        lower = is_far & (seen.log_ratio < 0) & (batch.advantage < 0)
        weight = batch.weight.masked_fill(higher | lower, 0.0)
        out = super()._loss(batch, velocity, old_velocity, **more | {"step_weight": weight})
        return out._replace(clipped_low=lower, clipped_high=higher)
