"""Objectives: from a velocity function and rows of a rollout to a loss. n rows, *D one latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkern.ops.policy_loss import PolicyLoss, policy_loss
from flowkern.rollout.engine import Batch, Velocity, guided


@dataclass(frozen=True)
class RatioClip:
    """The clipped likelihood ratio of drawn edges, with a KL to the reference where kl_coef > 0."""

    clip_low: float
    clip_high: float
    kl_coef: float = 0.0
    guidance_scale: float = 1.0
    uncond: int | None = None
    """The row of the conditioning without a prompt; needed with guidance."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def __call__(
        self, velocity: Velocity, batch: Batch, advantage: Tensor, reference: Velocity | None = None
    ) -> PolicyLoss:
        """The summed loss of n rows with its per-row statistics; advantage (n,).

        `reference` gives the velocity of the reference policy, called without gradient.
        The unconditional half of guidance has none either, so it is run without.
        """
        v_ref = None
        with torch.no_grad():
            if self.needs_reference:
                v_ref = reference(batch.x_t, batch.sigma, batch.prompt)
                v_ref = guided(v_ref, **self._guide(reference, batch))
            guide = self._guide(velocity, batch)
        return policy_loss(
            velocity(batch.x_t, batch.sigma, batch.prompt),
            batch.x_t,
            batch.x_next,
            batch.coefficients,
            advantage,
            old_velocity=batch.old_velocity,
            velocity_ref=v_ref,
            kl_coef=self.kl_coef,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            reduction="sum",
            **guide,
        )

    def _guide(self, velocity: Velocity, batch: Batch) -> dict[str, Any]:
        """The guidance arguments of a step; none without guidance."""
        if self.guidance_scale == 1.0:
            return {}
        no_prompt = torch.full_like(batch.prompt, self.uncond)
        uncond = velocity(batch.x_t, batch.sigma, no_prompt)
        return {"velocity_uncond": uncond, "guidance_scale": self.guidance_scale}
