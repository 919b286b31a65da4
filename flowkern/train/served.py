"""Which rewards a run has: what a server says of those that run there, and the commits of files on
the hub. A checkpoint keeps it, and a later process does not go on with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowkern.checks import ConfigError


def served(rewards: Any) -> dict[str, dict[str, str]]:
    """What there is to keep of the rewards of a task, by name."""
    if not isinstance(rewards, Mapping):  # a task of one's own has what it likes
        return {}
    found = {name: _kept(one) for name, one in rewards.items()}
    return {name: dict(what) for name, what in found.items() if isinstance(what, Mapping) and what}


def require_served(rewards: Any, before: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ConfigError where one of these became another since then."""
    now = served(rewards)
    for name in now.keys() & before.keys():
        try:
            if hasattr(_made(rewards[name]), "require_served"):
                _made(rewards[name]).require_served(before[name])
            else:
                _require_commits(now[name], before[name])
        except ValueError as error:
            raise ConfigError(
                f"reward.{name}: {error}; expected the former, or another name than "
                f"reward.{name} for it"
            ) from None


def _require_commits(now: Mapping[str, str], before: Mapping[str, str]) -> None:
    for path in now.keys() & before.keys():
        if now[path] != before[path]:
            raise ValueError(
                f"{path} is at commit {now[path]} and was at {before[path]}, as "
                f"{path}@{before[path]} is: scores of the two are not of one scale"
            )


def _kept(one: Any) -> Any:
    return getattr(_made(one), "served", None) or getattr(one, "commits", None)


def _made(one: Any) -> Any:
    """The reward, of one that knows its key."""
    return getattr(one, "reward", one)
