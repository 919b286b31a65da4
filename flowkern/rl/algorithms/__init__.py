"""Algorithms: one module each, with a class `Recipe` that holds the paper's defaults.

A recipe is data, and answers three questions: what is sampled (plan), who gets the credit
(credit), what is minimized (objective). The trainer knows no more than this protocol.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from flowkern.rl.objectives import RatioClip
from flowkern.rollout.plan import Chain

__all__ = ["Recipe", "names", "recipe", "require"]

RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "at least 2": lambda value: value >= 2,
    "from 0 to below 1": lambda value: 0 <= value < 1,
}


class Recipe(Protocol):
    """What every algorithm offers. B samples."""

    group_size: int
    """Samples per prompt."""
    prompts_per_rollout: int
    """Prompts of a rollout, over all processes."""
    updates_per_rollout: int
    """Optimizer steps per rollout; each sees its own share of the prompts."""
    guidance_scale: float
    """Classifier-free guidance in sampling and training; 1 is none."""

    def plan(self, grid: Callable[[int], Tensor]) -> Chain:
        """The chain of a rollout; grid: number of steps -> sigmas (S + 1,) of the model."""
        ...

    def credit(self, reward: Tensor, group: Tensor) -> Tensor:
        """Rewards (B,) and group keys (B,) of all processes -> advantages (B,)."""
        ...

    def objective(self, uncond: int) -> RatioClip:
        """The loss; uncond: the row of the conditioning without a prompt."""
        ...

    def released_rows(self) -> tuple[int, int]:
        """Forward rows per image of the authors' released loop: in sampling, in training."""
        ...


def names() -> list[str]:
    """The algorithms there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def recipe(name: str) -> type[Recipe]:
    """The recipe class of an algorithm; its fields are the options, their defaults the paper's."""
    if name not in names():
        raise ValueError(f"algorithm.name: got {name!r}, expected one of {', '.join(names())}")
    return import_module(f"{__name__}.{name}").Recipe


def require(owner: Any, expected: str, *names: str) -> None:
    """Raise ValueError naming the first field of `owner` outside of RANGES[expected]; None is in.

    For the __post_init__ of recipes and of the configuration.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and not RANGES[expected](value):
            raise ValueError(f"{name}: got {value}, expected a number {expected}")
