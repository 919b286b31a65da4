"""Flow-GRPO (arXiv 2505.05470; github.com/yifan123/flow_grpo, SD3.5-M on 512 x 512).

Every step of the chain is drawn from the SDE; all but the last are trained with the clipped ratio
and advantages by prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flowkern.rl.advantage import group_advantage
from flowkern.rl.algorithms import require
from flowkern.rl.objectives import RatioClip
from flowkern.rollout.plan import Chain
from flowkern.schedules import step_coefficients


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The released defaults."""

    num_inference_steps: int = 10
    """Steps T of a training rollout; evaluation takes more."""
    noise_level: float = 0.7
    """Of the SDE: g = noise_level sqrt(sigma / (1 - sigma))."""
    guidance_scale: float = 4.5
    """Classifier-free guidance in sampling and training; 1 is none."""
    group_size: int = 24
    """Images per prompt."""
    prompts_per_rollout: int = 48
    """Prompts per rollout, over all processes."""
    updates_per_rollout: int = 2
    """Optimizer steps per rollout; each sees its own share of the prompts."""
    clip_range: float = 1e-4
    """For 65,536 latent elements; the spread of the log-ratio goes with 1 / sqrt(elements)."""
    kl_coef: float = 0.004
    """Of the Gaussian KL to the reference, as in the paper; the code's later 0.04 lacks a dt."""
    adv_clip_max: float = 5.0
    """Advantages are clamped to +-this."""
    global_std: bool = True
    """Divide by the population std of all rewards of the rollout, not the group's own."""

    def __post_init__(self) -> None:
        require(self, "at least 2", "num_inference_steps", "group_size")
        require(self, "above 0", "noise_level", "guidance_scale", "prompts_per_rollout")
        require(self, "above 0", "updates_per_rollout", "adv_clip_max")
        require(self, "from 0 to below 1", "clip_range")
        require(self, "at least 0", "kl_coef")

    def plan(self, grid: Callable[[int], Tensor]) -> Chain:
        sigmas = grid(self.num_inference_steps)
        edges = step_coefficients(sigmas, "flow_sde", self.noise_level)
        trained = range(len(edges) - 1)  # the last draws next to nothing
        return Chain(sigmas, edges, trained, has_kl=self.kl_coef > 0)

    def credit(self, reward: Tensor, group: Tensor) -> Tensor:
        return group_advantage(
            reward, group, global_std=self.global_std, eps=1e-4, limit=self.adv_clip_max
        )

    def objective(self, uncond: int) -> RatioClip:
        return RatioClip(
            self.clip_range, self.clip_range, self.kl_coef, self.guidance_scale, uncond
        )

    def released_rows(self) -> tuple[int, int]:
        halves = 1 if self.guidance_scale == 1 else 2
        policies = 2 if self.kl_coef > 0 else 1  # the reference is run as well
        steps = self.num_inference_steps
        return halves * steps, halves * policies * (steps - 1)
