"""Pref-GRPO (arXiv 2508.20751; github.com/CodeGoat24/Pref-GRPO, FLUX.1-dev on 720 x 720).

DanceGRPO on Flow-GRPO's SDE, with win rates in the group as rewards: an image is compared with each
of the others, and small differences of a score are not blown up. Here a pair is decided by the
scores of a reward. In the released run a judge looks at both images, and CLIP's score joins as it
is: a reward that compares pairs itself gives win rates, which `dance_grpo` takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowkern import rl
from flowkern.rl.algorithms.dance_grpo import DanceGRPO
from flowkern.rl.recipe import NoiseLevel, RewardAggregation, SdeType


@dataclass(frozen=True, kw_only=True)
class PrefGRPO(DanceGRPO):
    """The released defaults for FLUX.1-dev."""

    num_inference_steps: int = 25
    group_size: int = 8
    prompts_per_rollout: int = 64
    updates_per_rollout: int = 2
    """As released: groups of 8, gradients of 4 images on each GPU."""
    noise_level: NoiseLevel = 0.7
    sde_type: SdeType = "flow_sde"
    multi_objective_aggregation: RewardAggregation = "normalize_then_sum"
    """As released."""

    def credit(self) -> rl.Credit:
        trimmed, best_of = self.trimmed_ratio, self.best_of
        how = {"eps": 1e-8, "unbiased": True, "trimmed_ratio": trimmed, "best_of": best_of}
        return self.group_credit(rl.WinRate, **how)
