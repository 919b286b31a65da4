"""Rewards: callables that score decoded images. This file has the protocol and the lookup by name.

A reward is any callable ``f(images, prompts, metadata) -> Tensor``; a function in the user's own
module serves as well as one from here.
"""

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

__all__ = ["REWARDS", "Reward", "load_reward"]


class Reward(Protocol):
    """Scores a batch of images, one number each; larger is better unless its name says distance."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:
        """images (B, C, H, W) in [0, 1], B prompts, B metadata rows -> (B,) float32."""
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
    Raises ValueError for a name that is neither and TypeError for options a function cannot take;
    a missing module or attribute raises what Python's import raises.
    """
    target = REWARDS.get(name, name)
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        known = ", ".join(sorted(REWARDS))
        raise ValueError(f"name: got {name!r}, expected one of {known}, or 'module:attribute'")
    reward = getattr(import_module(module), attribute)
    if inspect.isclass(reward):
        return reward(**options)
    if options:
        raise TypeError(f"options: {name!r} is no class and takes none, got {sorted(options)}")
    return reward
