"""CRD, centred reward distillation (arXiv 2603.14128; by the definition of Flow-Factory's trainer,
github.com/X-GenGroup/Flow-Factory, for SD3.5-M).

A model's implicit reward of an image is how much better it matches it than an old copy does. Less
its mean over the images of a prompt it is matched to the reward, less its mean: what depends on the
prompt alone cancels. Another copy samples, so that the old one may lag behind. Group sizes are
DiffusionNFT's, as the paper's could not be looked up. Flow-Factory centres over the batches of all
processes; here, as the paper says, over a prompt's images. `weight_temp`, `crd_loss_type: bce` and
`use_old_for_loss: false` are not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from flowkern import rl, rollout
from flowkern.checks import ABOVE_0, AT_LEAST_0, SHARE
from flowkern.rl.matching import Grid, MatchingRecipe, shared_random

LEAST_KL = 1e-4


@dataclass(frozen=True, kw_only=True)
class CRD(MatchingRecipe):
    """Flow-Factory's defaults, which are the paper's for OCR."""

    num_inference_steps: int = 10
    group_size: int = 24
    prompts_per_rollout: int = 48
    timestep_fraction: Annotated[float, SHARE] = 0.99
    """The share of the rollout's noise levels to match at, drawn for each rollout."""
    crd_beta: Annotated[float, ABOVE_0] = 1.0
    """Of the implicit reward, where it is held against the reward."""
    adaptive_logp: bool = True
    """Are the squared errors in the implicit reward over their own mean size?"""
    ref_coef: Annotated[float, AT_LEAST_0] = 0.1
    """Of the squared distance to the reference's velocity, the released `kl_beta`."""
    ref_guidance_scale: Annotated[float, AT_LEAST_0] = 4.5
    """Of the reference's velocity, as the paper's `kl_cfg`; up to 1: none."""
    reward_adaptive_kl: bool = True
    """Is that of the best reward, and falls to 1e-4 with the reward?"""
    use_shared_noise: bool = False
    """Are the images of a group noised with one noise?"""
    sampler: ClassVar[str | None] = "sampling"

    @property
    def copies(self) -> Mapping[str, Callable[[int], float]]:
        """The released `old_model_decay` and `sampling_model_decay`, 0-0.25-0.005-0.999 and
        75-0.0-0.0075-0.999: start, value there, slope, end."""
        return {
            "old": lambda n: min(0.999, 0.25 + 0.005 * n),
            "sampling": lambda n: 0.0 if n < 75 else min(0.999, 0.0075 * (n - 75)),
        }

    @property
    def num_train_timesteps(self) -> int:
        return max(1, int(self.num_inference_steps * self.timestep_fraction))

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        sigmas, chance = grid(self.num_inference_steps).tolist(), shared_random(seed, iteration)
        levels = chance.sample(sigmas[:-1], self.num_train_timesteps)
        return self.matched(sigmas, levels, self.use_shared_noise)

    def credit(self) -> rl.Credit:
        how = {"global_std": self.global_std, "scale": 1 / self.adv_clip_max}
        if not (self.reward_adaptive_kl and self.ref_coef):
            return self.group_credit(**how)
        return self.group_credit(rl.RewardKL, least=LEAST_KL / self.ref_coef, **how)

    def objective(self, guidance: rollout.Guidance | None) -> rl.CenteredReward:
        how = {"crd_beta": self.crd_beta, "limit": self.adv_clip_max}
        how |= {"adaptive_logp": self.adaptive_logp}
        return rl.CenteredReward("awm", "uniform", old="old", ref_coef=self.ref_coef, **how)
