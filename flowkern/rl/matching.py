"""What recipes share that train at chosen noise levels of images, however those came about."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from flowkern import rl, rollout
from flowkern.checks import AT_LEAST_0, BELOW_1
from flowkern.rl.recipe import Grid, Levels, Recipe, shared_random

__all__ = ["Grid", "Levels", "MatchingRecipe", "shared_random"]


@dataclass(frozen=True, kw_only=True)
class MatchingRecipe(Recipe):
    """Trains at chosen noise levels of each image, `num_train_timesteps`, with bounded
    advantages."""

    global_std: bool = True
    """Divide by the population std of all rewards of the rollout, not the group's own."""
    solver_order: Literal[1, 2, 3] = 2
    """Of DPM-Solver++, which samples (1 is Euler's method); the step to 0 is always of order 1."""
    last_sigma_ratio: Annotated[float, BELOW_1] = 0.5
    """Of the noise levels that are sampled on, the last above 0 is at least this share of the one
    before: SD3's own fall from .28 to .009 there, a step too long for order 2, and AWM's code goes
    to half. 0: the model's own, as in DiffusionNFT's code. Matching stays at the model's own."""
    ref_guidance_scale: Annotated[float, AT_LEAST_0] = 1.0
    """Of the reference's velocity in the pull to it, the released `kl_cfg`: the weights then match
    without guidance what the reference says with it. Up to 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.ref_guidance_scale
        if scale > 1 and scale != type(self).ref_guidance_scale and not self.ref_coef:
            raise ValueError(f"ref_guidance_scale: got {scale}, which ref_coef=0 ignores")

    def credit(self) -> rl.Credit:
        return self.group_credit(global_std=self.global_std, scale=1 / self.adv_clip_max)

    def objective_at(self, uncond: int, guide: rollout.Guide | None = None) -> rl.Objective:
        objective = super().objective_at(uncond, guide)
        ref = rollout.Guidance.of(self.ref_guidance_scale, uncond, guide)
        return replace(objective, ref_guidance=ref) if ref and self.ref_coef else objective

    def path(self, sigmas: list[float]) -> list[float]:
        """The noise levels that are sampled on, of a grid's."""
        path = [*sigmas]
        if len(path) > 2 and path[-2] > 0:  # a grid that has 0 twice is refused as it is
            path[-2] = max(path[-2], self.last_sigma_ratio * path[-3])
        return path

    def sampled(self, plan: rollout.Plan, member: int, sigmas: list[float]) -> int:
        """The position of a sample's leaf, deterministic but for its root. sigmas: of the grid."""
        node = plan.root(member)
        for sigma in self.path(sigmas)[1:]:
            node = plan.step(node, sigma, self.solver_order)
        return plan.leaf(node)

    def matched(self, sigmas: list[float], levels: list[float], is_one_noise: bool) -> rollout.Plan:
        """A group of samples, all matched at the same noise levels.

        sigmas: of the grid. is_one_noise: at a level all of them are noised with one noise.
        """
        plan, first = rollout.Plan(), {}
        for member in range(self.group_size):
            leaf = self.sampled(plan, member, sigmas)
            for sigma in levels:
                point = plan.match(leaf, sigma, first.get(sigma))
                if is_one_noise:
                    first.setdefault(sigma, point)
        return plan

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size = self.group_size
        return rollout.Cost(size * self.num_inference_steps, size * self.num_train_timesteps, size)
