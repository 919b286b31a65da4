"""Flow-GRPO-Fast (github.com/yifan123/flow_grpo, SD3.5-M on 512 x 512, without guidance).

Only a window of steps is drawn and trained, the rest is deterministic. Two forms: every sample from
its own noise, or all of a prompt from one, branching where the window begins. The window is the
same for the whole group and on every rank; the released loop draws one per rank and batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowkern.rl.algorithms import Grid, require, shared_random, windowed
from flowkern.rl.algorithms.flow_grpo import Recipe as FlowGRPO
from flowkern.rollout.plan import Cost, Plan


@dataclass(frozen=True, kw_only=True)
class Recipe(FlowGRPO):
    """The released defaults."""

    guidance_scale: float = 1.0
    noise_level: float = 0.8
    sde_type: Literal["flow_sde", "cps"] = "cps"
    clip_range: float = 1e-5
    kl_coef: float = 0.0
    window: int = 3
    """Steps that are drawn and trained, in the first half; 0: all but the last."""
    branching: bool = False
    """One root per prompt, from which the samples part at the window's start."""
    train_num_steps: int = 2
    """The window of the branching form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "at least 0", "window")
        require(self, "above 0", "train_num_steps")
        name, steps = "train_num_steps" if self.branching else "window", self.num_inference_steps
        if getattr(self, name) > steps // 2:
            got = getattr(self, name)
            raise ValueError(f"{name}: got {got}, expected at most {steps // 2}, half the steps")

    def drawn(self, iteration: int, seed: int) -> range:
        """The steps of the window."""
        size = self.train_num_steps if self.branching else self.window
        if size == 0:
            return range(self.num_inference_steps - 1)
        last = self.num_inference_steps // 2 - size
        start = shared_random(seed, iteration).randint(0, last)
        return range(start, start + size)

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> Plan:
        plan, sigmas = Plan(has_kl=self.kl_coef > 0), grid(self.num_inference_steps).tolist()
        window, sde = self.drawn(iteration, seed), (self.sde_type, self.noise_level)
        tail = sigmas[window.stop + 1 :]
        return windowed(plan, sigmas, window, tail, sde, self.group_size, self.branching)

    def released(self, iteration: int = 0, seed: int = 0) -> Cost:
        size, steps, window = self.group_size, self.num_inference_steps, self.drawn(iteration, seed)
        shared = window.start if self.branching else 0  # as far as the samples are one
        return Cost(shared + size * (steps - shared), size * len(window), size)
