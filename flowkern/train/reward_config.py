"""The section of a configuration that says what images are scored with."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, RootModel, model_validator

from flowkern.checks import ABOVE_0, ConfigError, Range
from flowkern.rewards import require_reward
from flowkern.rl.recipe import Recipe
from flowkern.train.fields import Section, Text, wanted

__all__ = ["RewardConfig", "Rewards"]


def _scale(value: Any) -> Any:
    """Before the types are tried one after another, which would name each as a key."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_name = isinstance(value, str) and bool(value.strip())
    if not (value is None or is_name or (is_number and 0 < abs(value) <= 1e100)):
        raise wanted("a number from -1e100 to 1e100 that is not 0, or a name")
    return value


class RewardConfig(Section, extra="allow"):
    weight: Annotated[float, Range(-1e100, 1e100)] = 1.0  # times a score beyond, it is no number
    """In the sum that is optimized; 0: only reported, a judge of what the optimized ones miss."""
    kind: Annotated[Text | None, Field(exclude_if=lambda kind: kind is None)] = None
    """What makes it, a name or "module:attribute"; None: its key is that."""
    timeout: Annotated[float | None, ABOVE_0, Field(exclude_if=lambda seconds: seconds is None)] = (
        None
    )
    """Seconds that a call of it may take, which then ends the run; None: as many as it likes."""
    scale: Annotated[
        float | Text | None, BeforeValidator(_scale), Field(exclude_if=lambda scale: scale is None)
    ] = None
    """What its scores are multiplied by before they count: a number, or the name of a scaling that
    the reward has. Records have raw scores. None: the reward's own default, or 1."""
    allow_nan: Annotated[bool, Field(exclude_if=lambda allowed: not allowed)] = False
    """May it give NaN, of an image that it cannot score? Nothing is then learned from that one."""

    @property
    def options(self) -> dict[str, Any]:
        """What its constructor takes: all other keys."""
        return dict(self.model_extra or {})


class Rewards(RootModel[dict[Text, RewardConfig]]):
    """By the name that they are reported under, "reward/name"."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _is_new(cls, tree: Any) -> Any:
        old = {"weights", "report"} & set(tree) if isinstance(tree, dict) else ()
        if old:
            raise ConfigError(
                f"reward.{max(old)}: is not how rewards are written any more; expected each by its "
                "name, as in reward: {NAME: {weight: 1.0}, JUDGE: {weight: 0}}, where 0 only "
                "reports"
            )
        return tree

    @staticmethod
    def require(kind: str, name: str) -> None:
        """Raise ConfigError for a kind that there is not."""
        require_reward(kind, name)

    @model_validator(mode="after")
    def _counts(self) -> Self:
        for name, one in self.root.items():
            self.require(one.kind or name, name)
            if name == "mean" or "/" in name:  # reward/mean is the sum, info/NAME/ENTRY an entry
                raise ConfigError(
                    f"reward.{name}: cannot be told apart in a record; expected "
                    'another name, and what it is as "kind"'
                )
        if not self.weights:
            got = "0 for every reward" if self.root else "none"
            raise ConfigError(f"reward: got {got}, expected at least one with a weight")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Of those that are optimized."""
        return {name: one.weight for name, one in self.root.items() if one.weight}


def require_asked(recipe: Recipe, rewards: Rewards) -> None:
    """Raise ConfigError, naming the option, for a reward that its credit asks and that there is
    not."""
    try:
        asked = recipe.credit().asks
    except ValueError as error:
        raise ConfigError(f"algorithm.{error}") from error
    for option, names in asked.items():
        for name in names:
            if name not in rewards.root:
                raise ConfigError(
                    f"algorithm.{option}: got {name!r}, expected one of the rewards under reward, "
                    f"{', '.join(rewards.root)}"
                )
