"""G2RPO (arXiv 2510.01982; github.com/bcmi/Granular-GRPO, FLUX.1-dev on 720 x 720).

From each early state of one deterministic trunk, branches are drawn and followed to their images
with steps of several sizes. A branch's advantage is the sum of those of its images, each compared
with those of the same step and step size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from flowkern import rl, rollout
from flowkern.rl.recipe import EvenGridRecipe, Grid, Levels, NoiseLevel, RewardAggregation


@dataclass(frozen=True, kw_only=True)
class G2RPO(EvenGridRecipe):
    """The released defaults."""

    num_inference_steps: int = 16
    group_size: int = 12
    prompts_per_rollout: int = 16
    noise_level: NoiseLevel = 0.7
    multi_objective_aggregation: RewardAggregation = "normalize_then_sum"
    """As released."""
    branch_steps: Levels = 8
    """The trunk's first states, that many, have branches."""
    granularities: list[int] = field(default_factory=lambda: [1, 2])
    """The step sizes that a branch is followed with; the paper has [1, 2, 3]."""
    over_leaves: Literal["sum", "mean"] = "sum"
    """Of the advantages of a branch's images; released: the sum, which grows with their number."""
    forms = MappingProxyType({"as in the paper": {"granularities": [1, 2, 3]}})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branch_steps > (most := self.num_inference_steps - 1):
            raise ValueError(f"branch_steps: got {self.branch_steps}, expected at most {most}")
        sizes = list(self.granularities)
        if not sizes or min(sizes) < 1 or len({*sizes}) < len(sizes):
            raise ValueError(f"granularities: got {sizes}, expected different step sizes, from 1")

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, sigmas = self.empty_plan(), self.levels(grid)
        state, sizes = plan.root(0), self.granularities
        for i in range(self.branch_steps):
            state = plan.step(state, sigmas[i]) if i else state
            for member in range(self.group_size):
                sde = *self.sde(i), member
                branch = plan.draw(state, sigmas[i + 1], *sde, is_trained=True)
                made: dict[tuple[int, float], int] = {}  # what step sizes share is computed once
                for j, size in enumerate(sizes):
                    node = branch
                    for sigma in sigmas[i + 2 :: size][:-1]:
                        if (node, sigma) not in made:
                            made[node, sigma] = plan.step(node, sigma)
                        node = made[node, sigma]
                    # The last step is to the clean prediction, wherever the step size ends.
                    plan.leaf(plan.step(node, 0.0), group=i * len(sizes) + j)
        return plan

    def credit(self) -> rl.Credit:
        return replace(super().credit(), over_leaves=self.over_leaves)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        steps, sizes, count = self.num_inference_steps, self.granularities, self.branch_steps
        tails = sum(-(-(steps - 1 - i) // size) for i in range(count) for size in sizes)
        images = 1 + self.group_size * count * len(sizes)  # the trunk's own image is logged
        return rollout.Cost(steps + self.group_size * (count + tails), count, images)
