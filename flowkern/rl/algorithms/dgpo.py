"""DGPO (arXiv 2510.08425; github.com/Luo-Yihong/DGPO, SD3.5-M on 512 x 512).

Images of DPM-Solver++, sampled by a copy that trails the weights. A prompt's group is noised with
one noise at a few noise levels, and its images are matched with their advantages, weighted by how
well the group as a whole is told apart already. The released loop samples with the copy from its
step `switch_ema_ref` on, and with the weights before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from flowkern import rl, rollout
from flowkern.checks import ABOVE_0, AT_LEAST_0, Range, count
from flowkern.rl.matching import Grid, Levels, MatchingRecipe, shared_random


@dataclass(frozen=True, kw_only=True)
class DGPO(MatchingRecipe):
    """The released defaults for OCR; coefficients are its README's."""

    num_inference_steps: int = 10
    group_size: int = 16
    prompts_per_rollout: int = 8
    guidance_scale: float = 4.5
    num_train_timesteps: Levels = 4
    """Noise levels to match at, others in each rollout."""
    trunc_steps: Annotated[int, count(1000)] = 6
    """They are among the first of the grid: this many and one, or all there are; 4 for GenEval."""
    beta_dpo: Annotated[float, ABOVE_0] = 100.0
    """Of the group's preference: the larger, the sooner a group that is told apart weighs less."""
    ref_coef: Annotated[float, AT_LEAST_0] = 1e-3
    """Of the squared distance to the reference's velocity, the released `train.beta`."""
    clip_range: Annotated[float, Range(0, 1, above=True)] = 1e-3
    """Of exp(d_old - d), the ratio of an image's matching to that of the copy that samples."""
    use_shared_noise: bool = True
    """Are the images of a group noised with one noise?"""
    use_ema_ref: bool = False
    """Is the group's preference over the copy that samples, not over the reference?"""
    sampler: ClassVar[str | None] = "old"

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = min(self.trunc_steps + 1, self.num_inference_steps)
        if self.num_train_timesteps > levels:
            got = f"got {self.num_train_timesteps}, expected at most {levels}"
            raise ValueError(f"num_train_timesteps: {got}, what trunc_steps leaves")

    @property
    def copies(self) -> Mapping[str, Callable[[int], float]]:
        updates = self.updates_per_rollout
        return {"old": lambda n: min(0.3, 0.001 * n * updates)}

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        sigmas, chance = grid(self.num_inference_steps).tolist(), shared_random(seed, iteration)
        levels = chance.sample(sigmas[:-1][: self.trunc_steps + 1], self.num_train_timesteps)
        return self.matched(sigmas, levels, self.use_shared_noise)

    def credit(self) -> rl.Credit:
        return self.group_credit(global_std=self.global_std)

    def objective(self, guidance: rollout.Guidance | None) -> rl.GroupPreference:
        clip, against = self.clip_range, "old" if self.use_ema_ref else "reference"
        how = {"clip_low": clip, "clip_high": clip, "beta_dpo": self.beta_dpo, "against": against}
        how |= {"group_size": self.group_size, "ref_coef": self.ref_coef}
        return rl.GroupPreference("awm", "uniform", old="old", **how)
