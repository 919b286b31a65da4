"""Rewards that run elsewhere: a checkpoint keeps which they were, and a later process does not go
on with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowkern.checks import ConfigError


def served(rewards: Any) -> dict[str, dict[str, str]]:
    """What there is to keep of the rewards of a task, by name."""
    if not isinstance(rewards, Mapping):  # a task of one's own has what it likes
        return {}
    found = {name: getattr(_made(one), "served", None) for name, one in rewards.items()}
    return {name: what for name, what in found.items() if isinstance(what, dict)}


def require_served(rewards: Any, before: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ConfigError where one of these became another since then."""
    for name in served(rewards).keys() & before.keys():
        try:
            _made(rewards[name]).require_served(before[name])
        except ValueError as error:
            raise ConfigError(
                f"reward.{name}: {error}; expected the former, or another name than "
                f"reward.{name} for it"
            ) from None


def _made(one: Any) -> Any:
    """The reward, of one that knows its key."""
    return getattr(one, "reward", one)
