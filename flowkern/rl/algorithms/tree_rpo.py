"""Dynamic-TreeRPO (arXiv 2509.23352, FLUX.1-dev), from its abstract's definition.

MixGRPO's sliding window as a tree: what comes before it is one deterministic trunk, every step of
it splits every state, and the rest is deterministic. Each layer of the tree has its own noise.

No code was found, and the paper's own numbers could not be read: the window, its pace, the number
of samples and flat `noise_scales` are MixGRPO's or chosen here, and credit by depth is how its
tree is read. LayerTuning-RL, a supervised loss that moves the clip range, is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from flowkern import rollout
from flowkern.checks import AT_LEAST_0, count
from flowkern.rl.recipe import Grid, Levels, NoiseLevel
from flowkern.rl.trees import TreeRecipe


@dataclass(frozen=True, kw_only=True)
class TreeRPO(TreeRecipe):
    """MixGRPO's defaults, with a tree in its window."""

    num_inference_steps: int = 25
    group_size: int = 16
    prompts_per_rollout: int = 32
    updates_per_rollout: int = 4
    noise_level: NoiseLevel = 0.7
    window: Levels = 4
    """Layers of the tree: steps that are drawn and trained, and split every state."""
    window_iterations: Annotated[int, count(2**31)] = 25
    """Iterations between two moves."""
    stride: Annotated[int, AT_LEAST_0] = 1
    """Steps per move; 0: the window stays at the start."""
    noise_scales: list[float] = field(default_factory=list)
    """What each layer multiplies `noise_level` with, from the first; []: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window > (most := self.num_inference_steps - 2):
            raise ValueError(f"window: got {self.window}, expected at most {most}, all but 2 steps")
        self.check_splits("window", range(self.window))
        scales = self.noise_scales
        if scales and (len(scales) != self.window or min(scales) <= 0):
            raise ValueError(f"noise_scales: got {scales}, expected {self.window} above 0, or none")

    def window_start(self, iteration: int = 0, seed: int = 0) -> int:
        """The first step of the window, which never reaches the grid's last two."""
        moves = iteration // self.window_iterations
        return min(moves * self.stride, self.num_inference_steps - 2 - self.window)

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        start, scales = self.window_start(iteration), self.noise_scales or [1.0] * self.window
        levels = {i: self.sde(i)[1] * scale for i, scale in enumerate(scales, start)}
        return self.tree(self.levels(grid), levels, levels)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        """One call for each edge of the tree, as nothing is released."""
        start = self.window_start(iteration)
        window = range(start, start + self.window)
        states = [len(after) for after in self.parts(window)]
        edges = sum(states[i] for i in window)
        return rollout.Cost(1 + sum(states[:-1]), edges, self.group_size)
