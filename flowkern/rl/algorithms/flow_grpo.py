"""Flow-GRPO (arXiv 2505.05470; github.com/yifan123/flow_grpo, SD3.5-M on 512 x 512).

Every step of every sample is drawn from the SDE; all but the last are trained with the clipped
ratio and advantages by prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowkern import rl, rollout
from flowkern.rl.recipe import Grid, NoiseLevel, PolicyRecipe


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(PolicyRecipe):
    """The released defaults."""

    num_inference_steps: int = 10
    guidance_scale: float = 4.5
    group_size: int = 24
    prompts_per_rollout: int = 48
    updates_per_rollout: int = 2
    noise_level: NoiseLevel = 0.7
    kl_coef: float = 0.004
    """As in the paper; the code's later 0.04 lacks a dt."""
    global_std: bool = True
    """Divide by the population std of all rewards of the rollout, not the group's own."""

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, sigmas = self.empty_plan(), grid(self.num_inference_steps).tolist()
        for member in range(self.group_size):
            node = plan.root(member)
            for i, sigma in enumerate(sigmas[1:]):
                trains = sigma > 0  # the last step draws next to nothing
                node = plan.draw(node, sigma, *self.sde(i), member, trains)
            plan.leaf(node)
        return plan

    def credit(self) -> rl.Credit:
        return self.group_credit(global_std=self.global_std)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size, steps = self.group_size, self.num_inference_steps
        return rollout.Cost(size * steps, size * (steps - 1), size)
