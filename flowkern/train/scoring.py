"""The rewards of a run: loaded by their keys, called with arguments of their own, checked.

B images, or B videos. Whatever a reward does wrong becomes a RewardError whose message begins with
its key.
"""

from __future__ import annotations

import copy
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkern.rewards import Reward, RewardError, load_reward
from flowkern.rewards.scores import real_numbers, scores_and_info
from flowkern.rl.advantage import LARGEST
from flowkern.train.config import ConfigError, Rewards
from flowkern.train.prompts import Prompt


@dataclass(frozen=True)
class KeyedReward:
    """A reward, and where the configuration has it; called, it is that reward."""

    key: str
    weight: float
    """In the weighted sum; 0: only reported."""
    reward: Reward
    timeout: float | None = None
    """Seconds of a call."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Prompt]) -> Any:
        return self.reward(images, prompts, metadata)


@dataclass(frozen=True)
class Scores:
    """What the rewards say of B images: (B,) float64 by name, on the host."""

    rewards: dict[str, Tensor]
    """Finite; "mean", the weighted sum, comes first."""
    info: dict[str, Tensor]
    """What rewards report beside, as "reward/entry"; NaN where an image has none."""

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Of all their images, in order."""
        entries = dict.fromkeys(entry for part in parts for entry in part.info)
        none = [torch.full((len(part),), torch.nan, dtype=torch.float64) for part in parts]
        return cls(
            {n: torch.cat([part.rewards[n] for part in parts]) for n in parts[0].rewards},
            {
                entry: torch.cat([p.info.get(entry, n) for p, n in zip(parts, none, strict=True)])
                for entry in entries
            },
        )

    def at(self, place: Tensor) -> Scores:
        """Of the images there."""
        return Scores(
            {name: value[place] for name, value in self.rewards.items()},
            {entry: value[place] for entry, value in self.info.items()},
        )

    def __len__(self) -> int:
        return len(self.rewards["mean"])

    def means(self) -> dict[str, float]:
        """As a record has them: "reward/name", and of the images that have it "info/name/entry"."""
        means = {f"reward/{name}": value.mean().item() for name, value in self.rewards.items()}
        known = {entry: v[v.abs() <= LARGEST] for entry, v in self.info.items()}
        return means | {f"info/{e}": v.mean().item() for e, v in known.items() if len(v)}


def load_rewards(config: Rewards) -> dict[str, KeyedReward]:
    """The rewards of a configuration, by name.

    Raises ConfigError, naming the key, for one that is not there or cannot be made.
    """
    found = {}
    for name, one in config.root.items():
        key = f"reward.{name}"
        try:
            reward = load_reward(one.kind or name, name, **one.options)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            is_said = isinstance(error, ValueError | TypeError | FileNotFoundError)
            message = " ".join(str(error).split()) if is_said else _line(error)
            is_option = message.partition(":")[0] in one.options
            raise ConfigError(f"{key}{'.' if is_option else ': '}{message}") from error
        found[name] = KeyedReward(key, one.weight, reward, one.timeout)
    return found


def evaluate(
    rewards: Mapping[str, KeyedReward], images: Tensor, prompts: Sequence[Prompt]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every reward of every image, by name, and what they report beside, as "reward/entry": (B,)
    float64 each, on the device of the images; nothing waits for it.

    Every reward gets images, texts and metadata of its own, to write into as it likes.
    Raises RewardError for a reward that fails, leaves (sys.exit), does not return in its time or
    not one real number per image. Whether they are finite is for `score` to see.
    """
    scores, info = {}, {}
    for name, reward in rewards.items():
        try:
            mine = [copy.deepcopy(prompt) for prompt in prompts]  # siblings share one
            texts = [prompt["prompt"] for prompt in prompts]
            with torch.no_grad(), _at_most(reward.timeout):
                found = reward(images.clone(), texts, mine)
        except _Late:
            late = f"{reward.key}: did not return within {reward.timeout:g} s, its timeout"
            raise RewardError(late) from None
        except (Exception, SystemExit) as error:
            raise RewardError(f"{reward.key}: {_line(error)}") from error
        found, entries = scores_and_info(found)
        try:
            scores[name] = real_numbers(found, len(images)).to(images.device)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            what = " ".join(str(error).split())
            raise RewardError(
                f"{reward.key}: returned {what}; expected {len(images)} real numbers, one per image"
            ) from error
        for entry, value in entries.items():
            try:
                info[f"{name}/{entry}"] = real_numbers(value, len(images)).to(images.device)
            except (ValueError, TypeError, RuntimeError, OverflowError):
                warnings.warn(
                    f"{reward.key}: info {entry!r} is not one real number per image, and not "
                    "reported",
                    stacklevel=2,
                )
    return scores, info


def score(
    rewards: Mapping[str, KeyedReward],
    batches: Iterable[tuple[Tensor, Sequence[Prompt]]],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Scores:
    """`evaluate` of batches (images, prompts), one after another, and the weighted sum.

    around: makes what each call of `evaluate` runs in.
    The host waits once, in the end. Raises what `evaluate` does, and RewardError for images that
    are not finite, and for a score that is not or is above 1e150 in size, naming the image by its
    place in all batches.
    """
    prompts: list[Prompt] = []
    parts, drawn = [], []
    for images, some in batches:
        prompts += some
        drawn.append(are_finite(images))
        try:
            with around():
                parts.append(evaluate(rewards, images, some))
        except RewardError:
            texts = [prompt["prompt"] for prompt in prompts]
            require_drawn(torch.cat(drawn), texts)  # then it is not the reward's fault
            raise
    names = list(rewards)
    entries = list(dict.fromkeys(entry for _, info in parts for entry in info))
    columns = []
    for (values, info), finite in zip(parts, drawn, strict=True):
        none = torch.full_like(values[names[0]], torch.nan)
        shown = [info.get(entry, none) for entry in entries]
        columns.append(torch.stack([finite.to(none), *(values[n] for n in names), *shown]))
    finite, *found = torch.cat(columns, dim=1).cpu()
    require_drawn(finite.bool(), [prompt["prompt"] for prompt in prompts])
    values = dict(zip(names, found, strict=False))
    for name, reward in rewards.items():
        _check(reward.key, values[name], prompts)
    mean = sum(reward.weight * values[name] for name, reward in rewards.items() if reward.weight)
    _check("reward: the weighted sum", mean, prompts)
    return Scores({"mean": mean} | values, dict(zip(entries, found[len(names) :], strict=True)))


class _Late(BaseException):
    """Leaves a reward wherever it is, as Stop does: no `except Exception` of its own holds it."""


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raises _Late where the interpreter is when the time is over: not inside of a call of C that
    does not come back. In the main thread alone; None: no limit.
    """
    if seconds is None:
        yield
        return

    def is_over(*_) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, is_over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def are_finite(images: Tensor) -> Tensor:
    """(B,) bool, of images or videos."""
    return images.flatten(1).isfinite().all(1)


def require_drawn(finite: Tensor, prompts: Sequence[str]) -> None:
    """Raise RewardError where not all `are_finite`: a reward that casts to bytes scores black."""
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"model: {len(bad)} of {len(finite)} images are not finite, the first of prompt "
            f"{prompts[bad[0]]!r:.80}; expected weights of numbers, and a "
            "train.mixed_precision that holds what the network computes (bf16 where fp16 overflows)"
        )


def _check(key: str, value: Tensor, prompts: Sequence[Prompt]) -> None:
    bad = (~(value.abs() <= LARGEST)).nonzero().flatten().tolist()
    if bad:
        others = f", and of {len(bad) - 1} others" if bad[1:] else ""
        first, text = value[bad[0]].item(), prompts[bad[0]]["prompt"]
        raise RewardError(
            f"{key}: {first:g} for image {bad[0]} of {len(value)}, prompt {text!r:.80}{others}; "
            f"expected finite numbers up to {LARGEST:g} in size"
        )


def _line(error: BaseException) -> str:
    """What was raised and where, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text:.300} (at {Path(frames[-1].filename).name}:{frames[-1].lineno})"
