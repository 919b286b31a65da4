"""DanceGRPO (arXiv 2505.07818; github.com/XueZeyue/DanceGRPO, FLUX.1-dev on 720 x 720).

The samples of a prompt start from one noise; every step but the last is drawn from an SDE of
constant noise, and the image is the clean prediction of the last state. Each sample trains on a
random part of its steps. The tree is shared by all prompts of a rollout, and with it the choice of
steps: it differs between the samples of a prompt and between rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from flowkern import rollout
from flowkern.checks import SHARE
from flowkern.rl.recipe import EvenGridRecipe, Grid, NoiseLevel, SdeType, shared_random


@dataclass(frozen=True, kw_only=True)
class DanceGRPO(EvenGridRecipe):
    """The released defaults."""

    num_inference_steps: int = 16
    group_size: int = 12
    prompts_per_rollout: int = 16
    updates_per_rollout: int = 4
    """The released loop makes 3, of a third of every group each; here groups stay whole."""
    noise_level: NoiseLevel = 0.3
    sde_type: SdeType = "dance_sde"
    init_same_noise: bool = True
    """One starting noise per prompt; its first step is computed once."""
    timestep_fraction: Annotated[float, SHARE] = 0.6
    """The share of the drawn steps that is trained."""

    @property
    def num_trained(self) -> int:
        return max(1, int((self.num_inference_steps - 1) * self.timestep_fraction))

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, chance = self.empty_plan(), shared_random(seed, iteration)
        sigmas, root = self.levels(grid), None
        for member in range(self.group_size):
            if root is None or not self.init_same_noise:
                root = plan.root(member)
            node, trained = root, chance.sample(range(len(sigmas) - 2), self.num_trained)
            for i, sigma in enumerate(sigmas[1:-1]):
                node = plan.draw(node, sigma, *self.sde(i), member, is_trained=i in trained)
            plan.leaf(plan.step(node, 0.0))
        return plan

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size = self.group_size
        trained = (self.best_of or size) * self.num_trained
        return rollout.Cost(size * self.num_inference_steps, trained, size)
