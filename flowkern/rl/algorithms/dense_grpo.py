"""DenseGRPO (arXiv 2601.20218, SD3.5-M), from its abstract's definition.

Every step but the last is drawn and trained. From every state of a sample deterministic steps go
on to an image, and a drawn step's reward is what it adds: the reward of the image after it, less
that of the image before it. Gains of one step are compared with each other.

No code was found, and the paper's own numbers could not be read: sizes are Flow-GRPO's. It
calibrates the noise of each step by rewards as it goes; here `noise_level` may be a list, of a
whole run.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowkern import rl, rollout
from flowkern.rl.recipe import Grid, NoiseLevel, PolicyRecipe


@dataclass(frozen=True, kw_only=True)
class DenseGRPO(PolicyRecipe):
    """Flow-GRPO's defaults, with a reward for each step."""

    num_inference_steps: int = 10
    guidance_scale: float = 4.5
    group_size: int = 24
    prompts_per_rollout: int = 48
    updates_per_rollout: int = 2
    noise_level: NoiseLevel = 0.7
    kl_coef: float = 0.004
    """As Flow-GRPO's paper has it."""

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, sigmas = self.empty_plan(), grid(self.num_inference_steps).tolist()
        for member in range(self.group_size):
            state = plan.root(member)
            for i in range(len(sigmas) - 1):
                if i:
                    state = plan.draw(state, sigmas[i], *self.sde(i - 1), member, is_trained=True)
                node = state
                for sigma in sigmas[i + 1 :]:
                    node = plan.step(node, sigma)
                plan.leaf(node, group=i)
        return plan

    def credit(self) -> rl.GainCredit:
        return self.group_credit(rl.GainCredit)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        """One call for each step of each way, as nothing is released."""
        size, steps = self.group_size, self.num_inference_steps
        tails = steps * (steps + 1) // 2
        return rollout.Cost(size * (steps - 1 + tails), size * (steps - 1), size * steps)
