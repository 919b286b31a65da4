"""Flow-DPPO (arXiv 2606.11025; github.com/Tencent-Hunyuan/UniRL, FlowDPPO, SD3.5-M on 512 x 512).

A few of the early steps are drawn and trained. The ratio is not clipped: where the KL of a step to
the policy that sampled is over a threshold, what would move it further away is dropped, and what
brings it back is kept. The released `add_kl_coefficient: false`, which leaves the std out of the
KL, is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from flowkern import rl, rollout
from flowkern.checks import ABOVE_0, SHARE
from flowkern.rl.recipe import Grid, Levels, NoiseLevel, StepRecipe, shared_random


@dataclass(frozen=True, kw_only=True)
class FlowDPPO(StepRecipe):
    """The released defaults for PickScore."""

    num_inference_steps: int = 10
    group_size: int = 16
    prompts_per_rollout: int = 48
    updates_per_rollout: int = 2
    noise_level: NoiseLevel = 0.7
    kl_mask_threshold: Annotated[float, ABOVE_0] = 1e-5
    """Of the KL of a step, a mean over the latent's elements: it is the same for all sizes."""
    num_sde_steps: Levels = 3
    """Steps that are drawn and trained, others in each rollout."""
    timestep_fraction: Annotated[float, SHARE] = 0.5
    """They are among the first of the grid, this share of its steps, and never its last."""
    global_std: bool = True
    """Divide by the population std of all rewards of the rollout, not the group's own."""
    needs_std = True  # of the KL to the policy that sampled

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_sde_steps > self.early:
            got = f"got {self.num_sde_steps}, expected at most {self.early}"
            raise ValueError(f"num_sde_steps: {got}, the steps that timestep_fraction leaves")

    @property
    def early(self) -> int:
        """How many of the grid's steps there are to choose from."""
        steps = self.num_inference_steps
        return min(max(1, int(steps * self.timestep_fraction)), steps - 1)

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, sigmas = self.empty_plan(), grid(self.num_inference_steps).tolist()
        drawn = shared_random(seed, iteration).sample(range(self.early), self.num_sde_steps)
        for member in range(self.group_size):
            node = plan.root(member)
            for i, sigma in enumerate(sigmas[1:]):
                if i in drawn:
                    node = plan.draw(node, sigma, *self.sde(i), member, is_trained=True)
                else:
                    node = plan.step(node, sigma)
            plan.leaf(node)
        return plan

    def credit(self) -> rl.Credit:
        return self.group_credit(global_std=self.global_std)

    def objective(self, guidance: rollout.Guidance | None) -> rl.DivergenceMask:
        how = {"guidance": guidance, "uncond_gradient": self.uncond_gradient}
        return rl.DivergenceMask(
            kl_coef=self.kl_coef, kl_mask_threshold=self.kl_mask_threshold, **how
        )

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size = self.group_size
        return rollout.Cost(size * self.num_inference_steps, size * self.num_sde_steps, size)
