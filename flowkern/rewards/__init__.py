"""Rewards: callables that score decoded images. This file has the protocol and the lookup by name.

A reward is any callable ``f(images, prompts, metadata) -> scores``; a function in the user's own
module serves as well as one from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from flowkern.checks import ConfigError, shown
from flowkern.lookup import load, locate, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = [
    "REWARDS",
    "Reward",
    "RewardError",
    "Unscored",
    "Values",
    "load_reward",
    "require_reward",
]

Values: TypeAlias = "Tensor | np.ndarray | Sequence[float]"
"""One real number per image: (B,) of any dtype, or a list."""


class RewardError(ValueError):
    """A reward failed, or gave what is no score; the message begins with its key."""


class Unscored(RewardError):
    """A batch that could not be scored, for a reason outside of this process: a server that does
    not answer. Its images have no score, which is not the score 0; the run goes on without them.
    """


class Reward(Protocol):
    """Scores a batch of images, one number each; larger is better unless its name says distance."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Values | tuple[Values, Mapping[str, Values]]:
        """images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], B prompts and the metadata of
        each -> B finite scores; or those and what else is to be reported of each, by name.

        The arguments are the reward's own: it may write into them.
        """
        ...


REWARDS = {
    "aesthetic": "flowkern.rewards.aesthetic:Aesthetic",
    "clipscore": "flowkern.rewards.clipscore:ClipScore",
    "digits_classifier": "flowkern.rewards.digits:DigitsClassifier",
    "digits_diversity": "flowkern.rewards.digits:DigitsDiversity",
    "digits_judge": "flowkern.rewards.digits:DigitsJudge",
    "distance_to_real": "flowkern.rewards.digits:DistanceToReal",
    "diversity": "flowkern.rewards.diversity:Diversity",
    "geneval": "flowkern.rewards.geneval:GenEval",
    "hpsv2": "flowkern.rewards.hpsv2:HpsV2",
    "hpsv3": "flowkern.rewards.hpsv3:HpsV3",
    "imagereward": "flowkern.rewards.imagereward:ImageReward",
    "jpeg_compressibility": "flowkern.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "flowkern.rewards.jpeg:JpegIncompressibility",
    "ocr": "flowkern.rewards.ocr:Ocr",
    "pickscore": "flowkern.rewards.pickscore:PickScore",
    "remote": "flowkern.rewards.remote.client:RemoteReward",
    "videoalign": "flowkern.rewards.videoalign:VideoAlign",
    "vlm_judge": "flowkern.rewards.judge:VlmJudge",
}
"""Short names; the modules behind them are imported only when asked for."""


def require_reward(kind: str, name: str | None = None) -> None:
    """Raise ConfigError, as `load_reward`, for a `kind` that is neither a key of `REWARDS` nor
    "module:attribute", and say how it can be had; nothing is imported.
    """
    key, place = _places(kind, name)
    try:
        locate(kind, REWARDS, place)
    except ConfigError as error:
        how = f'; {kind!r} is not built in: write it, and name it in {key}.kind="module:attribute"'
        raise ConfigError(f"{error}{'' if 'did you mean' in str(error) else how}") from None


def _places(kind: str, name: str | None) -> tuple[str, str]:
    """The keys of a reward, and of what says which it is."""
    key = f"reward.{name or kind}"
    return key, f"{key}.kind" if name not in (None, kind) else key


OPTIONS = ("weight", "kind", "timeout", "scale", "allow_nan")
"""Of every reward in a configuration: not its constructor's."""
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_reward(kind: str, name: str | None = None, /, **options: Any) -> Reward:
    """The reward that `kind` stands for: a key of `REWARDS`, or ``"module:attribute"`` of any
    module.

    A class is built with `options`; a function takes none. name: what a configuration calls it;
    None: `kind`. A class that requires an option `name` gets this one, if options has no other.
    Raises ConfigError, naming reward.NAME or the option, for what there is not, cannot be called or
    is asynchronous, and for options that a class does not have or lacks.
    """
    require_reward(kind, name)
    key, place = _places(kind, name)
    found = load(kind, REWARDS, place)
    if inspect.isclass(found):
        found = found(**_fitting(found, options, name or kind))
    elif options:
        option = next(iter(options))
        raise ConfigError(
            f"{key}.{option}: unknown key; a function takes no options: make it a class, whose "
            f"constructor has {option}"
        )
    if not callable(found):
        raise ConfigError(f"{key}: {kind!r} is {type(found).__name__}, and cannot be called")
    if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__):
        raise ConfigError(
            f"{key}: {kind!r} is asynchronous; expected a function that returns scores"
        )
    return found


def option_of(kind: str, message: str) -> str | None:
    """The option of a built-in reward that an error's message begins with, also where it has its
    default.
    """
    option, colon, _ = message.partition(": ")
    if not colon or kind not in REWARDS:
        return None
    parameters = inspect.signature(load(kind, REWARDS)).parameters
    return option if option in parameters else None


def _fitting(kind: type, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keywords that `kind` is built with, as its signature says."""
    parameters = inspect.signature(kind).parameters
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind in NAMED]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {"name": name, **options} if "name" in required else dict(options)
    known = [*OPTIONS, *(p.name for p in parameters.values() if p.kind in NAMED)]
    for option in given:
        if option not in known and not takes_all:
            near = nearest(option, known)
            known_are = f"known are {', '.join(known)}"
            hint = f"did you mean 'reward.{name}.{near}'?" if near else known_are
            raise ConfigError(f"reward.{name}.{option}: unknown key; {hint}")
    for option in required:
        if option not in given:
            raise ConfigError(f"reward.{name}.{option}: missing, and has no default")
    for option, value in given.items():
        wanted = _refused(_annotation(parameters, option), value)
        if wanted is not None:
            raise ConfigError(f"reward.{name}.{option}: got {shown(value)}, expected {wanted}")
    return given


PLAIN = {
    "int": (int, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a string"),
    "Path": (Path, "a string"),
    "None": (type(None), "null"),
}
"""Annotations of options that are held to, alone and as `X | None`: what they take, in types and in
words."""


def _refused(hint: str, value: Any) -> str | None:
    """What an annotation wanted instead of a value; None: it fits, or other types are its class's
    to check, as of `int | str`, whose strings are words of its own.
    """
    kinds = [kind.rpartition(".")[2] for kind in hint.split(" | ")]
    if not set(kinds) <= set(PLAIN) or (len(kinds) > 1 and "None" not in kinds):
        return None
    types = tuple(PLAIN[kind][0] for kind in kinds)
    if isinstance(value, bool):  # which is an int, too
        return None if bool in types else _in_words(kinds)
    return None if isinstance(value, types) else _in_words(kinds)


def _in_words(kinds: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(PLAIN[kind][1] for kind in kinds))


def _annotation(parameters: Mapping[str, inspect.Parameter], option: str) -> str:
    """As text, which it is already where annotations are not evaluated."""
    hint = parameters[option].annotation if option in parameters else ""
    return str(getattr(hint, "__name__", hint))
