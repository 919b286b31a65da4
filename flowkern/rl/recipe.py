"""Recipes: what an algorithm is, apart from its numbers, and what several of them share.

A recipe is data, and answers four questions: what is sampled (plan), who gets the credit (credit),
what is minimized (objective), and which other weights take part (copies). The trainer knows no more
than this. Its fields are the options; their defaults are its paper's, or its released code's.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from flowkern import rl, rollout
from flowkern.checks import (
    ABOVE_0,
    AT_LEAST_0,
    BELOW_1,
    Held,
    Range,
    check_fields,
    count,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AnyRecipe",
    "EvenGridRecipe",
    "Grid",
    "Levels",
    "NoiseLevel",
    "PolicyRecipe",
    "Recipe",
    "RewardAggregation",
    "SdeType",
    "ShiftedRecipe",
    "StepRecipe",
    "shared_random",
]

Grid = Callable[[int], "Tensor"]
"""Number of steps -> the model's noise levels (S + 1,), from 1 to 0."""

RewardAggregation: TypeAlias = Literal[
    "sum_then_normalize", "normalize_then_sum", "normalize_then_mean"
]
"""How several rewards become one advantage, by TRL's words. sum_then_normalize: that of their
weighted sum, as in Flow-GRPO's code; normalize_then_sum: the weighted sum of each reward's own
advantages, as in GDPO (arXiv 2601.05242) and G2RPO's code; normalize_then_mean: over the sum of the
sizes of the weights, so that a negative one stays a penalty, as MixGRPO's advantage_aggr."""

SDES = ("flow_sde", "dance_sde", "cps")
"""Of `schedules.KINDS`, those that have a noise level."""


class _Draws(Held):
    def check(self, name: str, value: Any) -> None:
        if value is not None and value not in SDES:
            from flowkern.schedules.own import sampler_of  # here, as it imports torch

            sampler_of(value, name, SDES)


class _Each(Range):
    """Of a number, or of each of several."""

    def check(self, name: str, value: Any) -> None:
        for i, one in enumerate(value if isinstance(value, list) else [value]):
            super().check(f"{name}[{i}]" if isinstance(value, list) else name, one)


NoiseLevel = Annotated[float | list[float], _Each(0, above=True)]
"""Of drawn steps: one for all, or one for each step of the grid."""

SdeType = Annotated[str, _Draws()]
"""A sampler of steps that are drawn: one of `SDES`, or "module:function" of one's own."""

Levels = Annotated[int, count(1000)]
"""A number of noise levels; models are trained on a thousand."""


@dataclass(frozen=True, kw_only=True)
class AnyRecipe:
    """What every algorithm has, whatever it trains: all that the loop asks."""

    group_size: Annotated[int, count(4096, least=2)]
    """Samples that are compared with each other."""
    prompts_per_rollout: Annotated[int, count(2**16)]
    """Prompts of a rollout, over all processes."""
    updates_per_rollout: Annotated[int, count(2**16)] = 1
    """Optimizer steps per rollout; each sees its own share of the prompts."""
    min_std: Annotated[float, AT_LEAST_0] = 1e-6
    """A group whose rewards have a standard deviation below this teaches nothing: advantage 0."""

    copies: ClassVar[Mapping[str, Callable[[int], float]]] = MappingProxyType({})
    """Other versions of the trained weights: name -> decay d after rollout number n = 1, 2, ...:
    copy = d copy + (1 - d) current, once per rollout."""
    sampler: ClassVar[str | None] = None
    """The copy that samples; None: the current weights."""
    read_from: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Copies that are read, and not the weights as they begin: name -> the option that names their
    checkpoint. A resume reads them again."""

    task: ClassVar[str]
    """What is trained: the name of a Task of the trainer's, or "module:attribute" of one's own."""

    def decay(self, copy: str, rollout: int, record: Mapping[str, float]) -> float:
        """What `copies` says of one of them after rollout number `rollout`, whose last optimizer
        step left `record`, the same on all processes: a metric by name."""
        return self.copies[copy](rollout)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Recipe(AnyRecipe, ABC):
    """What every algorithm of flow-matching models offers."""

    num_inference_steps: Annotated[int, count(1000, least=2)]
    """Steps of a training rollout; evaluation takes more."""
    guidance_scale: Annotated[float, AT_LEAST_0] = 1.0
    """Classifier-free guidance; up to 1 is none."""
    adv_clip_max: Annotated[float, ABOVE_0] = 5.0
    """Advantages are clamped to +-this."""
    scale_rewards: bool = True
    """Divide advantages by a standard deviation, their group's or, with `global_std`, that of all?
    Where not, as TRL has it by this name, they are rewards less the mean of their group, and
    `adv_clip_max` is in units of the reward."""
    multi_objective_aggregation: RewardAggregation = "sum_then_normalize"
    """How several rewards are mixed: by value (sum_then_normalize, as Flow-GRPO does), or by
    advantage, as a sum (normalize_then_sum: GDPO, arXiv 2601.05242) or as a mean
    (normalize_then_mean: MixGRPO's code)."""

    task: ClassVar[str] = "flow"

    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    """Other published settings, to be counted beside the defaults: name -> options."""

    @abstractmethod
    def plan(self, grid: Grid, iteration: int = 0, seed: int = 0) -> rollout.Plan:
        """The tree of every prompt of a rollout, or of its first: a function of the arguments
        alone, so that all ranks walk the same one.
        """

    def plans(self, grid: Grid, iteration: int = 0, seed: int = 0) -> Sequence[rollout.Plan]:
        """(prompts_per_rollout,): the tree of each prompt. Prompts that follow each other with one
        and the same are sampled together; all are of one form (`Plan.form`).
        """
        return [self.plan(grid, iteration, seed)] * self.prompts_per_rollout

    def dealt(self, places: int, iteration: int, seed: int) -> list[int]:
        """(prompts_per_rollout,): a place that chance has for each prompt, 0 to `places` - 1. In an
        update those of one place follow each other: which prompts they are is chance already.
        """
        chance, out, total = shared_random(seed, iteration), [], self.prompts_per_rollout
        count = -(-total // self.updates_per_rollout)
        for first in range(0, total, count):
            drawn = [chance.randint(0, places - 1) for _ in range(min(count, total - first))]
            out += sorted(drawn, key=drawn.index)
        return out

    @abstractmethod
    def credit(self) -> rl.Credit:
        """How rewards become advantages."""

    def group_credit(self, kind: type[rl.Credit] | None = None, **options: Any) -> rl.Credit:
        """`Credit`, or a class derived from it, of these options and of those that all recipes
        have.
        """
        kind = kind or rl.Credit
        mix = self.multi_objective_aggregation
        common = {"limit": self.adv_clip_max, "min_std": self.min_std}
        common["scale_rewards"] = self.scale_rewards
        return kind(**common, multi_objective_aggregation=mix, **options)

    @abstractmethod
    def objective(self, guidance: rollout.Guidance | None) -> rl.Objective:
        """The loss; guidance: as in the rollout."""

    @abstractmethod
    def released(self, iteration: int = 0, seed: int = 0) -> rollout.Cost:
        """What the authors' released loop takes per prompt, guidance not counted."""

    def window_start(self, iteration: int = 0, seed: int = 0) -> int | None:
        """The first drawn step of a rollout, where that moves."""
        return None

    def guidance(self, uncond: int, guide: rollout.Guide | None = None) -> rollout.Guidance | None:
        """uncond: the row of the conditioning without a prompt. guide: of the model's family."""
        return rollout.Guidance.of(self.guidance_scale, uncond, guide)

    def objective_at(self, uncond: int, guide: rollout.Guide | None = None) -> rl.Objective:
        """The loss, with the guidance of all that it asks; arguments as of `guidance`."""
        return self.objective(self.guidance(uncond, guide))


@dataclass(frozen=True, kw_only=True)
class StepRecipe(Recipe):
    """Trains drawn edges."""

    noise_level: NoiseLevel
    """Of the SDE, as `schedules.edge_coefficients` takes it; a list has one for each step of the
    grid, in order, drawn or not."""
    sde_type: SdeType = "flow_sde"
    """The sampler of drawn steps: Flow-GRPO's SDE (`flow_sde`), DanceGRPO's (`dance_sde`),
    coefficients-preserving sampling (`cps`, with noise levels around 0.8), or `module:function` of
    your own (docs/algorithms.md)."""
    kl_coef: Annotated[float, AT_LEAST_0] = 0.0
    """Of the Gaussian KL to the reference at the trained edges."""
    anchor: ClassVar[str] = "reference"
    """The weights that it is to: the reference, or a copy."""
    uncond_gradient: bool = False
    """Does the unconditional half of guidance learn too, as in DanceGRPO's and Flow-Factory's code?
    It does not in Flow-GRPO's of July 2025. A rate belongs to one of both (docs/choosing.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_scale <= 1 and self.uncond_gradient > type(self).uncond_gradient:
            raise ValueError(
                "uncond_gradient: got True, but there is no second half at guidance_scale "
                f"{self.guidance_scale}; expected one above 1"
            )
        levels, steps = self.noise_level, self.num_inference_steps
        if isinstance(levels, list) and len(levels) != steps:
            got = f"got {len(levels)} of them"
            raise ValueError(f"noise_level: {got}, expected {steps}, one for each step of the grid")

    @property
    def needs_std(self) -> bool:
        """Is something divided by the std of trained edges?"""
        return self.kl_coef > 0

    def empty_plan(self) -> rollout.Plan:
        """One without a node, which refuses trained edges that the loss is not defined on."""
        return rollout.Plan(self.needs_std)

    def sde(self, step: int) -> tuple[str, float]:
        """Sampler and noise level of step number `step`, as `Plan.draw` takes them."""
        level = self.noise_level
        return self.sde_type, level[step] if isinstance(level, list) else level

    def windowed(
        self,
        sigmas: list[float],
        window: range,
        tail: list[float],
        is_shared: bool = True,
        order: int = 1,
        weight: float = 1.0,
    ) -> rollout.Plan:
        """A group of samples, drawn and trained in a window of steps and deterministic around it.

        sigmas: the noise levels up to the window's end, at least; tail: those after it; order: of
        the solver there. is_shared: the samples are one up to the window. weight: of its steps.
        """
        plan, trunk = self.empty_plan(), None
        for member in range(self.group_size):
            if trunk is None or not is_shared:
                trunk = plan.root(member)
                for sigma in sigmas[1 : window.start + 1]:
                    trunk = plan.step(trunk, sigma)
            node = trunk
            for i in window:
                node = plan.draw(node, sigmas[i + 1], *self.sde(i), member, True, weight)
            for sigma in tail:
                node = plan.step(node, sigma, order)
            plan.leaf(node)
        return plan


@dataclass(frozen=True, kw_only=True)
class PolicyRecipe(StepRecipe):
    """Trains them with the clipped ratio."""

    clip_range: Annotated[float, BELOW_1] = 1e-4
    """For 65,536 latent elements; the spread of the log-ratio goes with 1 / sqrt(elements)."""
    clip_elements: ClassVar[int] = 65_536
    """Of the latents that the default `clip_range` is for."""
    ratio: ClassVar[str] = "sde"
    """Or "guard", as in `policy_loss`."""

    @property
    def needs_std(self) -> bool:
        return self.ratio == "guard" or super().needs_std

    def objective(self, guidance: rollout.Guidance | None) -> rl.RatioClip:
        clip = self.clip_range
        both = self.uncond_gradient
        how = {"guidance": guidance, "uncond_gradient": both, "anchor": self.anchor}
        return rl.RatioClip(clip, clip, self.kl_coef, self.ratio, **how)


@dataclass(frozen=True, kw_only=True)
class ShiftedRecipe(PolicyRecipe):
    """On a grid of equal steps."""

    shift: Annotated[float | None, Range(0, above=True, most=1000)] = 3.0
    """Of the grid of equal steps; None: the model's own grid."""
    multi_objective_aggregation: RewardAggregation = "normalize_then_mean"
    """As in MixGRPO's code; see `Recipe`."""

    def levels(self, grid: Grid, first: int = 0, points: int | None = None) -> list[float]:
        """Noise levels from place `first` of the grid to its end, falling.

        points: this many, equally far apart before the shift (on the model's own grid, between its
        places); None: the grid's.
        """
        import numpy as np  # here, as all that is not needed to read a recipe's options

        from flowkern.schedules import shifted_sigmas

        steps, shift = self.num_inference_steps, self.shift
        own = (grid(steps) if shift is None else shifted_sigmas(steps, shift)).tolist()
        if points is None:
            return own[first:]
        places = np.linspace(first, steps, points)
        if shift is None:
            return np.interp(places, range(steps + 1), own).tolist()
        u = 1 - places / steps
        return (shift * u / (1 + (shift - 1) * u)).tolist()


@dataclass(frozen=True, kw_only=True)
class EvenGridRecipe(ShiftedRecipe):
    """With the unbiased std of each group, of which some may be left out."""

    best_of: Annotated[int | None, ABOVE_0] = None
    """Train on this many of a group, half of them the best, half the worst; None: on all."""
    trimmed_ratio: Annotated[float, BELOW_1] = 0.0
    """The share of a group, its lowest rewards, that mean and std leave out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of is not None and (self.best_of % 2 or self.best_of > self.group_size):
            raise ValueError(
                f"best_of: got {self.best_of}, expected an even number, at most group_size, "
                f"{self.group_size}"
            )

    def credit(self) -> rl.Credit:
        trimmed, best_of = self.trimmed_ratio, self.best_of
        return self.group_credit(eps=1e-8, unbiased=True, trimmed_ratio=trimmed, best_of=best_of)


def shared_random(seed: int, iteration: int) -> random.Random:
    """Chance that all ranks and all members of a group share."""
    return random.Random(f"{seed}/{iteration}")
