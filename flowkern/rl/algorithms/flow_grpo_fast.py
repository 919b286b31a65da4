"""Flow-GRPO-Fast (github.com/yifan123/flow_grpo, SD3.5-M on 512 x 512, without guidance).

Only a window of steps is drawn and trained, the rest is deterministic. Two forms: every sample from
its own noise, or all of a prompt from one, branching where the window begins. The window is one for
a whole group; the released loop draws one per rank and batch, over which groups are spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from types import MappingProxyType
from typing import Annotated

from flowkern import rollout
from flowkern.checks import AT_LEAST_0
from flowkern.rl.algorithms.flow_grpo import FlowGRPO
from flowkern.rl.recipe import Grid, Levels, NoiseLevel, SdeType, shared_random


@dataclass(frozen=True, kw_only=True)
class FlowGRPOFast(FlowGRPO):
    """The released defaults."""

    guidance_scale: float = 1.0
    noise_level: NoiseLevel = 0.8
    sde_type: SdeType = "cps"
    clip_range: float = 1e-5
    kl_coef: float = 0.0
    window: Annotated[int, AT_LEAST_0] = 3
    """Steps that are drawn and trained, in the first half; 0: all but the last."""
    window_per_prompt: bool = False
    """A window of each prompt's own, or one for all of a rollout."""
    branching: bool = False
    """One root per prompt, from which the samples part at the window's start."""
    train_num_steps: Levels = 2
    """The window of the branching form."""
    forms = MappingProxyType({"branching": {"branching": True}})

    def __post_init__(self) -> None:
        super().__post_init__()
        name, steps = "train_num_steps" if self.branching else "window", self.num_inference_steps
        if getattr(self, name) > steps // 2:
            got = getattr(self, name)
            raise ValueError(f"{name}: got {got}, expected at most {steps // 2}, half the steps")

    @property
    def num_drawn(self) -> int:
        """Steps of the window."""
        steps = self.train_num_steps if self.branching else self.window
        return steps or self.num_inference_steps - 1

    def starts(self, iteration: int, seed: int) -> list[int]:
        """(prompts_per_rollout,): the first step of each prompt's window."""
        places = 1 + max(0, self.num_inference_steps // 2 - self.num_drawn)
        if self.window_per_prompt:
            return self.dealt(places, iteration, seed)
        return [shared_random(seed, iteration).randint(0, places - 1)] * self.prompts_per_rollout

    def window_start(self, iteration: int = 0, seed: int = 0) -> int:
        return self.starts(iteration, seed)[0]

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        return self.at(grid, self.window_start(iteration, seed))

    def plans(self, grid: Grid, iteration: int = 0, seed: int = 0) -> list[rollout.Plan]:
        return [*map(cache(partial(self.at, grid)), self.starts(iteration, seed))]

    def at(self, grid: Grid, start: int) -> rollout.Plan:
        sigmas, stop = grid(self.num_inference_steps).tolist(), start + self.num_drawn
        window, tail = range(start, stop), sigmas[stop + 1 :]
        return self.windowed(sigmas, window, tail, is_shared=self.branching)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size, steps = self.group_size, self.num_inference_steps
        # As far as the samples are one.
        shared = fmean(self.starts(iteration, seed)) if self.branching else 0
        return rollout.Cost(shared + size * (steps - shared), size * self.num_drawn, size)
