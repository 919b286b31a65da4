"""GARDO (arXiv 2512.24138; github.com/tinnerhrhe/GARDO, SD3.5-M on 512 x 512).

Flow-GRPO with undivided advantages and a KL of few images: those whose reward beats more of the
rollout than auxiliary rewards do, which are asked and not optimized. It is to a copy of the weights
that is made anew now and then, and what is good learns more the less it is like its group. The
released loop, whose rank 1 is the best, takes the KL of images that the reward ranks worse than the
others do; here it is the paper's. The share of images, which both let drift by 10 % with the mean
uncertainty of 20 rollouts, is fixed, and GARDO on DiffusionNFT is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from flowkern import rl, rollout
from flowkern.checks import ABOVE_0, SHARE, count
from flowkern.rl.algorithms.flow_grpo import FlowGRPO
from flowkern.rl.recipe import Grid


@dataclass(frozen=True, kw_only=True)
class GARDO(FlowGRPO):
    """The released settings for OCR, and the paper's clip range, noise and threshold."""

    kl_coef: float = 0.04
    scale_rewards: bool = False
    timestep_fraction: Annotated[float, SHARE] = 0.89
    """The share of the grid's steps that is trained, from the first; never its last."""
    init_same_noise: bool = True
    """One starting noise per prompt, as in the paper; its first step is computed once."""
    auxiliary_rewards: list[str] = field(default_factory=lambda: ["aesthetic", "imagereward"])
    """Rewards of the configuration, by name and usually with weight 0, that the optimized one is
    held against; larger is better, where need be by `scale: -1`."""
    kl_share: Annotated[float, SHARE] = 0.1
    """Of the images of a rollout, the most uncertain: only they have a KL."""
    diversity_reward: str | None = "diversity"
    """One that says how far an image is from its group's others: positive advantages are multiplied
    with it over its mean in the group, as released (the paper has no mean); None: they are not."""
    reset_freq: Annotated[int, count(10**9)] = 15
    """Rollouts after which the anchor of the KL becomes the weights; released, one more."""
    kl_thres: Annotated[float, ABOVE_0] = 1e-4
    """It does so, too, after a rollout whose last update has a mean KL, of all images, above it."""
    anchor = "anchor"

    @property
    def copies(self) -> Mapping[str, Callable[[int], float]]:
        return {"anchor": lambda n: float(n % self.reset_freq > 0)} if self.kl_coef else {}

    def decay(self, copy: str, rollout: int, record: Mapping[str, float]) -> float:
        is_far = record.get("kl", 0.0) > self.kl_thres
        return 0.0 if is_far else super().decay(copy, rollout, record)

    @property
    def num_trained(self) -> int:
        most = self.num_inference_steps - 1
        return min(max(1, int((most + 1) * self.timestep_fraction)), most)

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, sigmas, root = self.empty_plan(), grid(self.num_inference_steps).tolist(), None
        for member in range(self.group_size):
            if root is None or not self.init_same_noise:
                root = plan.root(member)
            node = root
            for i, sigma in enumerate(sigmas[1:]):
                node = plan.draw(node, sigma, *self.sde(i), member, i < self.num_trained)
            plan.leaf(node)
        return plan

    def credit(self) -> rl.UncertainKL:
        how = {"auxiliary_rewards": self.auxiliary_rewards, "kl_share": self.kl_share}
        how |= {"diversity_reward": self.diversity_reward, "global_std": self.global_std}
        return self.group_credit(rl.UncertainKL, **how)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size = self.group_size
        return rollout.Cost(size * self.num_inference_steps, size * self.num_trained, size)
