"""MixGRPO (arXiv 2507.21802; github.com/Tencent-Hunyuan/MixGRPO, FLUX.1-dev on 720 x 720).

A window of steps is drawn and trained; it slides along the grid as training goes on. The rest is
deterministic, and up to the window the samples of a prompt are one. The window is a function of
(iteration, seed) and stays whole; released, it ends up empty, and the random one is each rank's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from flowkern import rollout
from flowkern.checks import AT_LEAST_0, count
from flowkern.rl.recipe import EvenGridRecipe, Grid, Levels, NoiseLevel, shared_random


@dataclass(frozen=True, kw_only=True)
class MixGRPO(EvenGridRecipe):
    """The released defaults."""

    num_inference_steps: int = 25
    group_size: int = 12
    prompts_per_rollout: int = 32
    updates_per_rollout: int = 4
    noise_level: NoiseLevel = 0.7
    init_same_noise: bool = True
    """One starting noise per prompt; what comes before the window is computed once."""
    window: Levels = 4
    """Steps that are drawn and trained."""
    strategy: Literal["progressive", "random", "decay", "exp_decay"] = "progressive"
    """How the window moves: evenly, anywhere at every iteration, or faster and faster."""
    window_iterations: Annotated[int, count(2**31)] = 25
    """Iterations between two moves; "decay" goes from 10 to 1 instead."""
    stride: Annotated[int, AT_LEAST_0] = 1
    """Steps per move; 0: the window stays at the start."""
    roll_back: bool = False
    """Does the window begin anew after the last place, or stay there?"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window > (most := self.num_inference_steps - 2):
            raise ValueError(f"window: got {self.window}, expected at most {most}, all but 2 steps")

    def window_start(self, iteration: int = 0, seed: int = 0) -> int:
        """The first step of the window; its last start leaves the grid's last two steps out."""
        start, last = 0, self.num_inference_steps - 2 - self.window
        if self.strategy == "random":
            return shared_random(seed, iteration).randint(0, last)
        while self.stride and (start < last or self.roll_back) and iteration >= self._stay(start):
            iteration -= self._stay(start)
            start = 0 if start == last else min(start + self.stride, last)
        return start

    def _stay(self, start: int) -> int:
        """Iterations until the window leaves this place."""
        if self.strategy == "decay":
            share = start / (self.num_inference_steps - 2)
            return max(1, int(10 * (1 - share) + share))
        decay = math.exp(-0.1 * max(0, start - 13)) if self.strategy == "exp_decay" else 1
        return math.ceil(self.window_iterations * decay)

    def tail(self, grid: Grid, stop: int) -> tuple[list[float], int]:
        """The noise levels after the window, which ends at place `stop`, and the solver's order."""
        return self.levels(grid, stop)[1:], 1

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        start = self.window_start(iteration, seed)
        window = range(start, start + self.window)
        tail, order = self.tail(grid, window.stop)
        is_shared = self.init_same_noise
        return self.windowed(self.levels(grid), window, tail, is_shared=is_shared, order=order)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size = self.group_size
        return rollout.Cost(size * self.num_inference_steps, size * self.window, size)
