"""Rewards: callables that score decoded images. This file has the protocol and the lookup by name.

A reward is any callable ``f(images, prompts, metadata) -> scores``; a function in the user's own
module serves as well as one from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from flowkern.lookup import load

__all__ = ["REWARDS", "Reward", "RewardError", "Values", "load_reward"]

Values = Tensor | np.ndarray | Sequence[float]
"""One real number per image: (B,) of any dtype, or a list."""


class RewardError(ValueError):
    """A reward failed, or gave what is no score; the message begins with its key."""


class Reward(Protocol):
    """Scores a batch of images, one number each; larger is better unless its name says distance."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Values | tuple[Values, Mapping[str, Values]]:
        """images (B, C, H, W) in [0, 1], B prompts, B metadata rows -> B finite scores; or those
        and what else is to be reported of each image, by name.

        The arguments are the reward's own: it may write into them.
        """
        ...


REWARDS = {
    "digits_classifier": "flowkern.rewards.digits:DigitsClassifier",
    "digits_judge": "flowkern.rewards.digits:DigitsJudge",
    "distance_to_real": "flowkern.rewards.digits:DistanceToReal",
}
"""Short names; the modules behind them are imported only when asked for."""


def load_reward(name: str, **options: Any) -> Reward:
    """The reward called `name`: a key of `REWARDS`, or ``"module:attribute"`` of any module.

    A class is instantiated with `options`; a function is returned as it is and takes none.
    Raises ValueError for a name that is neither, or that cannot be imported, and TypeError for what
    cannot be called or is asynchronous, or for options a function cannot take.
    """
    reward = load(name, REWARDS)
    if inspect.isclass(reward):
        reward = reward(**options)
    elif options:
        raise TypeError(f"options: {name!r} is no class and takes none, got {sorted(options)}")
    if not callable(reward):
        raise TypeError(f"name: {name!r} is {type(reward).__name__}, and cannot be called")
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        raise TypeError(f"name: {name!r} is asynchronous; expected a function that returns scores")
    return reward
