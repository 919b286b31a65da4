"""TempFlow-GRPO (arXiv 2508.04324; github.com/Shredded-Pork/TempFlow-GRPO, SD3.5-M on 512 x 512).

From every state of a few deterministic trunks, branches are drawn and followed to their images.
The branches of one state are compared with each other: their rewards differ by that step alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import nan
from statistics import fmean
from typing import Annotated

from flowkern import rl, rollout
from flowkern.checks import count
from flowkern.rl.recipe import Grid, NoiseLevel, PolicyRecipe


@dataclass(frozen=True, kw_only=True)
class TempFlowGRPO(PolicyRecipe):
    """The released defaults for GenEval."""

    num_inference_steps: int = 10
    guidance_scale: float = 4.5
    num_seeds: Annotated[int, count(4096)] = 4
    """Trunks per prompt."""
    group_size: int = 6
    """Branches of every state but the last of a trunk, compared with each other."""
    prompts_per_rollout: int = 48
    updates_per_rollout: int = 2
    noise_level: NoiseLevel = 0.7
    kl_coef: float = 0.004
    """As released; 0.001 for PickScore."""

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        from flowkern.schedules import edge_coefficients

        plan, sigmas = self.empty_plan(), grid(self.num_inference_steps).tolist()
        edges, size = enumerate(pairwise(sigmas[:-1])), self.group_size
        std = [float(edge_coefficients(*edge, *self.sde(i)).std) for i, edge in edges]
        # By the noise of the step, 1 on average: a constant of one grid is wrong on another.
        mean = fmean(std) or nan  # which no plan takes for a weight
        weights = [each / mean for each in std]
        for trunk in range(self.num_seeds):
            members = range(trunk * size, (trunk + 1) * size)
            state = plan.root(members[0])
            for i, weight in enumerate(weights):
                state = plan.step(state, sigmas[i]) if i else state
                for member in members:
                    node = plan.draw(state, sigmas[i + 1], *self.sde(i), member, True, weight)
                    for sigma in sigmas[i + 2 :]:
                        node = plan.step(node, sigma)
                    plan.leaf(node, group=trunk * len(weights) + i)
        return plan

    def credit(self) -> rl.Credit:
        return self.group_credit()

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        steps, seeds, size = self.num_inference_steps, self.num_seeds, self.group_size
        branches = seeds * size * (steps - 1)
        return rollout.Cost(seeds * (steps - 1) + branches * steps // 2, branches, branches)
