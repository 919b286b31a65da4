"""Flash-GRPO (arXiv 2605.15980; github.com/Shredded-Pork/Flash-GRPO, Wan2.1-T2V-1.3B, 81 frames).

One step is drawn and trained, the same for all samples of a prompt, another for other prompts. A
step's gradient goes with the slope of its log-ratio, so it is weighted with 1 / slope: their mean
is 1 over all steps that may be drawn, in the released loop over a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from math import nan
from statistics import fmean
from typing import Annotated

from flowkern import rl, rollout
from flowkern.checks import SHARE
from flowkern.rl.recipe import Grid, NoiseLevel, PolicyRecipe, SdeType


@dataclass(frozen=True, kw_only=True)
class FlashGRPO(PolicyRecipe):
    """The released defaults for 96 GPUs."""

    num_inference_steps: int = 20
    guidance_scale: float = 4.5
    uncond_gradient: bool = True
    group_size: int = 8
    prompts_per_rollout: int = 48
    updates_per_rollout: int = 2
    sde_type: SdeType = "dance_sde"
    noise_level: NoiseLevel | None = None
    """None: of `dance_sde`, sigma of the step times the grid's second."""
    clip_range: float = 1e-3
    """For 2,096,640 latent elements, those of 81 frames in 480 x 832."""
    clip_elements = 2_096_640
    timestep_fraction: Annotated[float, SHARE] = 0.5
    """The step is among the first of the grid, this share of them, and never the last."""
    global_std: bool = True
    """Divide by the population std of all rewards of the rollout, not the group's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_level is None and self.sde_type != "dance_sde":
            raise ValueError(f"noise_level: got None, expected a number for {self.sde_type!r:.80}")

    @property
    def early(self) -> int:
        most = self.num_inference_steps - 1
        return min(max(1, int((most + 1) * self.timestep_fraction)), most)

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        return self.plans(grid, iteration, seed)[0]

    def plans(self, grid: Grid, iteration: int = 0, seed: int = 0) -> list[rollout.Plan]:
        return [*map(cache(self.drawn(grid)), self.dealt(self.early, iteration, seed))]

    def drawn(self, grid: Grid) -> Callable[[int], rollout.Plan]:
        """The plan of each step that may be drawn."""
        from flowkern.schedules import edge_coefficients

        sigmas, rectified = grid(self.num_inference_steps).tolist(), []
        if self.noise_level is None:  # as released
            return replace(self, noise_level=[s * sigmas[1] for s in sigmas[:-1]]).drawn(grid)
        for i, edge in enumerate(pairwise(sigmas[: self.early + 1])):
            c = edge_coefficients(*edge, *self.sde(i))
            slope = float(2 * c.k * c.b.abs() * c.std)  # of the log-ratio, by the velocity
            rectified.append(1 / (slope or nan))  # which no plan takes for a weight
        window, mean = partial(self.windowed, sigmas, is_shared=False), fmean(rectified)
        return lambda i: window(range(i, i + 1), sigmas[i + 2 :], weight=rectified[i] / mean)

    def credit(self) -> rl.Credit:
        return self.group_credit(global_std=self.global_std)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size = self.group_size
        return rollout.Cost(size * self.num_inference_steps, size, size)
