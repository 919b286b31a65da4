"""DiffusionNFT (arXiv 2509.16117; github.com/NVlabs/DiffusionNFT, SD3.5-M on 512 x 512).

An old policy samples with DPM-Solver++ of order 2, released on the model's own grid
(`last_sigma_ratio` 0). Over its images the forward process is matched with two mirrored velocities,
towards good images and away from bad ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from flowkern import rl, rollout
from flowkern.checks import ABOVE_0, AT_LEAST_0, SHARE
from flowkern.rl.matching import Grid, MatchingRecipe, shared_random

DECAYS: tuple[Callable[[int], float], ...] = (
    lambda step: 0.0,
    lambda step: min(0.5, 0.001 * step),
    lambda step: 0.0 if step < 75 else min(0.999, 0.0075 * (step - 75)),
)
"""The released types: how much of the old policy stays after optimizer step number `step`."""


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT(MatchingRecipe):
    """The released defaults for GenEval, PickScore and HPSv2."""

    num_inference_steps: int = 10
    group_size: int = 24
    prompts_per_rollout: int = 48
    timestep_fraction: Annotated[float, SHARE] = 0.99
    """The share of the rollout's noise levels to match at, drawn for each image."""
    decay_type: Literal[0, 1, 2] = 1
    """How the old policy follows: at once, ever later up to half, or at once for 75 steps only
    (for OCR)."""
    nft_beta: Annotated[float, ABOVE_0] = 1.0
    """b, the released `beta` (`train.beta` is ref_coef): how far apart the two velocities are held;
    .1 for OCR and for several rewards. By its author smaller is faster, and less stable."""
    weighting: Literal["adaptive", "uniform"] = "adaptive"
    """Of the squared errors: by their own mean size, as released, or `uniform`, as with MILES's
    --diffusion-nft-adaptive-weight off."""
    ref_coef: Annotated[float, AT_LEAST_0] = 1e-4
    """Of the squared distance to the reference's velocity."""
    sampler: ClassVar[str | None] = "old"

    @property
    def copies(self) -> Mapping[str, Callable[[int], float]]:
        decay, updates = DECAYS[self.decay_type], self.updates_per_rollout
        return {"old": lambda n: decay(n * updates)}

    @property
    def num_train_timesteps(self) -> int:
        return max(1, int(self.num_inference_steps * self.timestep_fraction))

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, chance = rollout.Plan(), shared_random(seed, iteration)
        sigmas = grid(self.num_inference_steps).tolist()
        for member in range(self.group_size):
            leaf = self.sampled(plan, member, sigmas)
            for sigma in chance.sample(sigmas[:-1], self.num_train_timesteps):
                plan.match(leaf, sigma)
        return plan

    def objective(self, guidance: rollout.Guidance | None) -> rl.Matching:
        how = {"weighting": self.weighting, "nft_beta": self.nft_beta}
        return rl.Matching("nft", old="old", ref_coef=self.ref_coef, **how)
