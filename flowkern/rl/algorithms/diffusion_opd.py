"""DiffusionOPD (arXiv 2605.15055, SD3.5-M on 512 x 512): on-policy distillation.

The student samples, and learns what a teacher, another adapter of the same network, says at each of
its states: the KL of the two steps' Gaussians, in closed form, or without noise, as in the released
runs, half the squared distance of their means. Rewards are watched and teach nothing. One teacher
for all prompts; released, each of several sets may have its own. The numbers are those of a copy of
the released code, as the authors' own could not be looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

from flowkern import rl, rollout
from flowkern.checks import ABOVE_0, AT_LEAST_0, SHARE, count
from flowkern.rl.recipe import Grid, StepRecipe

UNUSED = ("min_std", "adv_clip_max", "scale_rewards", "multi_objective_aggregation")


@dataclass(frozen=True, kw_only=True)
class DiffusionOPD(StepRecipe):
    """The released settings for one teacher, 8 GPUs."""

    num_inference_steps: int = 10
    group_size: Annotated[int, count(4096)] = 1
    """Samples of a prompt; nothing is compared."""
    prompts_per_rollout: int = 72
    guidance_scale: float = 4.5
    noise_level: Annotated[float, AT_LEAST_0] = 0.0
    """Of the SDE; 0: steps are Euler's, and a std of 1 stands in the KL."""
    kl_coef: Annotated[float, ABOVE_0] = 1.0
    """Of the KL to the teacher, which is all of the loss."""
    uncond_gradient: bool = True
    timestep_fraction: Annotated[float, SHARE] = 0.99
    """The share of the grid's steps that is trained, from the first."""
    teacher: str | None = None
    """A checkpoint of a run with the same `lora`, or of all weights where that is null: a folder
    checkpoint-N, its ema, or what `flowkern export` wrote."""
    teacher_guidance_scale: Annotated[float, AT_LEAST_0] = 4.5
    """Of the teacher's velocity; up to 1: none, and more only where the student has guidance."""
    anchor = "teacher"
    read_from: ClassVar[Mapping[str, str]] = {"teacher": "teacher"}
    copies: ClassVar[Mapping[str, Callable[[int], float]]] = {"teacher": lambda n: 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            if field.name in UNUSED and (got := getattr(self, field.name)) != field.default:
                raise ValueError(f"{field.name}: got {got!r}, but no reward is learned from")
        if self.teacher_guidance_scale > 1 >= self.guidance_scale:
            got = f"got {self.teacher_guidance_scale}, expected at most 1"
            raise ValueError(f"teacher_guidance_scale: {got}, as guidance_scale has no guidance")

    @property
    def num_trained(self) -> int:
        return max(1, int(self.num_inference_steps * self.timestep_fraction))

    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        plan, sigmas = rollout.Plan(needs_ratio=False), grid(self.num_inference_steps).tolist()
        for member in range(self.group_size):
            node = plan.root(member)
            for i, sigma in enumerate(sigmas[1:]):
                node = plan.draw(node, sigma, *self.sde(i), member, i < self.num_trained)
            plan.leaf(node)
        return plan

    def credit(self) -> rl.NoCredit:
        return self.group_credit(rl.NoCredit)

    def objective(self, guidance: rollout.Guidance | None) -> rl.Distillation:
        how = {"guidance": guidance, "anchor_scale": self.teacher_guidance_scale}
        return rl.Distillation(kl_coef=self.kl_coef, uncond_gradient=self.uncond_gradient, **how)

    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        size = self.group_size
        return rollout.Cost(size * self.num_inference_steps, size * self.num_trained, size)
