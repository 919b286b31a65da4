"""GRPO-Guard (arXiv 2510.22319; released in github.com/yifan123/flow_grpo, SD3.5-M).

Flow-GRPO with a ratio whose spread does not depend on the step, and steps weighted so that their
gradients are of one size. Both follow from each edge's own coefficients; the released loop takes
means over a batch, right only where all its samples are at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from flowkern import rollout
from flowkern.rl.algorithms.flow_grpo import FlowGRPO
from flowkern.rl.recipe import Grid


@dataclass(frozen=True, kw_only=True)
class GRPOGuard(FlowGRPO):
    """The released defaults for OCR and GenEval."""

    clip_range: float = 2e-6
    """Of the guarded ratio; 4e-6 for PickScore. For 65,536 latent elements."""
    kl_coef: float = 0.0
    global_std: bool = False
    ratio = "guard"

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, sigmas = self.empty_plan(), grid(self.num_inference_steps).tolist()
        for member in range(self.group_size):
            node = plan.root(member)
            for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
                sde = *self.sde(i), member
                weight = 1 / (sigma - sigma_next)
                node = plan.draw(node, sigma_next, *sde, is_trained=sigma_next > 0, weight=weight)
            plan.leaf(node)
        return plan
