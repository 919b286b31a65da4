"""MixGRPO-Flash (arXiv 2507.21802; github.com/Tencent-Hunyuan/MixGRPO, FLUX.1-dev on 720 x 720).

MixGRPO with fewer steps after the window, of DPM-Solver++ with the history of the whole path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from flowkern import rollout
from flowkern.checks import SHARE
from flowkern.rl.algorithms.mixgrpo import MixGRPO
from flowkern.rl.recipe import Grid


@dataclass(frozen=True, kw_only=True)
class MixGRPOFlash(MixGRPO):
    """The released defaults."""

    window_iterations: int = 20
    tail_ratio: Annotated[float | None, SHARE] = 0.4
    """Points after the window, as a share of the grid's from the window's last step on; None: the
    grid's own."""
    tail_order: Literal[1, 2, 3] = 2
    """Of DPM-Solver++ there."""

    def points(self, stop: int) -> int:
        """The released count of noise levels from the window's end, at place `stop`, to 0."""
        steps = self.num_inference_steps
        if self.tail_ratio is None:
            return steps - stop + 1
        return int(max((steps - (stop - 1)) * self.tail_ratio, 1))

    def tail(self, grid: Grid, stop: int) -> tuple[list[float], int]:
        # One point leaves no step to 0: the released code decodes a noisy state there.
        points = None if self.tail_ratio is None else max(2, self.points(stop))
        return self.levels(grid, stop, points)[1:], self.tail_order

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        stop = self.window_start(iteration, seed) + self.window
        steps = stop + self.points(stop) - 1
        return replace(super().released(iteration, seed), sample=self.group_size * steps)
