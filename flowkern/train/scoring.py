"""The rewards of a run: loaded by their keys, asked batch by batch, mixed and reported.

B images, or B videos. What a reward cannot score for a reason outside of this process is NaN here,
and so is the weighted sum of that image: it is as if it had never been sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowkern.checks import ConfigError, counted
from flowkern.extras import how_to_have
from flowkern.rewards import RewardError, load_reward, option_of
from flowkern.rewards.pixels import as_bytes
from flowkern.rewards.weights import commits
from flowkern.rl.advantage import LARGEST
from flowkern.train.prompts import Prompt
from flowkern.train.reward_calls import AHEAD, Answer, Begun, Call, KeyedReward, Threads, line
from flowkern.train.reward_config import RewardConfig, Rewards

MEAN = "mean"
"""What is optimized: the weighted sum of scaled scores."""


@dataclass(frozen=True)
class Scores:
    """What the rewards say of B images: (B,) float64 by name, on the host."""

    rewards: dict[str, Tensor]
    """As the rewards gave them, NaN for none; MEAN, what is optimized, comes first."""
    info: dict[str, Tensor]
    """What rewards report beside, as "reward/entry"; NaN where an image has none."""
    may_fail: frozenset[str] = frozenset()
    """The rewards that may leave images out."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Of those that left a whole batch out, the first one's."""

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
            frozenset().union(*(part.may_fail for part in parts)),
            {n: why for part in reversed(parts) for n, why in part.reasons.items()},
        )

    def at(self, place: Tensor) -> Scores:
        """Of the images there."""
        return replace(
            self,
            rewards={name: value[place] for name, value in self.rewards.items()},
            info={entry: value[place] for entry, value in self.info.items()},
        )

    def __len__(self) -> int:
        return len(self.rewards[MEAN])

    def failed(self) -> dict[str, int]:
        """How many images have no score, by reward; MEAN: how many are left out of training."""
        return {name: int(value.isnan().sum()) for name, value in self.rewards.items()}

    def explained(self) -> dict[str, str]:
        """Of the rewards that have no score of some image, why, or of how many."""
        return {
            name: self.reasons.get(
                name, f"reward.{name}: NaN for {count} of {counted(len(self), 'image')}"
            )
            for name, count in self.failed().items()
            if count and name != MEAN
        }

    def means(self) -> dict[str, float]:
        """As a record has them, of the images that have them: "reward/name", NaN where none has,
        and "info/name/entry"; and "failed_rewards/name", how many have no score, of rewards that
        may leave some out, with "failed_rewards", how many are left out of training.
        """
        means = {f"reward/{n}": v[~v.isnan()].mean().item() for n, v in self.rewards.items()}
        known = {entry: v[v.abs() <= LARGEST] for entry, v in self.info.items()}
        means |= {f"info/{e}": v.mean().item() for e, v in known.items() if len(v)}
        failed = self.failed()
        left_out = {f"failed_rewards/{n}": failed[n] for n in failed if n in self.may_fail}
        return means | left_out | ({"failed_rewards": failed[MEAN]} if left_out else {})


def load_rewards(config: Rewards) -> dict[str, KeyedReward]:
    """The rewards of a configuration, by name.

    Raises ConfigError, naming the key, for one that is not there or cannot be made.
    """
    found = {}
    for name, one in config.root.items():
        key = f"reward.{name}"
        try:
            with commits() as files:
                reward = load_reward(one.kind or name, name, **one.options)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            is_option = text.partition(":")[0] in one.options or option_of(one.kind or name, text)
            is_said = isinstance(error, ValueError | TypeError | FileNotFoundError)
            message = (text if is_said or is_option else line(error)) + how_to_have(error)
            raise ConfigError(f"{key}{'.' if is_option else ': '}{message}") from error
        may_be_nan = one.allow_nan or bool(getattr(reward, "may_fail", False))
        scale = _scale(f"{key}.scale", one, reward)
        found[name] = KeyedReward(key, one.weight, reward, one.timeout, scale, may_be_nan, files)
    return found


def _scale(key: str, one: RewardConfig, reward: object) -> tuple[float, float]:
    """Factor and offset. Raises ConfigError for a name that the reward has not."""
    known = dict(getattr(reward, "scales", {}))
    name = getattr(reward, "default_scale", None) if one.scale is None else one.scale
    if not isinstance(name, str):
        return 1.0 if name is None else float(name), 0.0
    if name not in known:
        among = f"one of {', '.join(known)}, or a number" if known else "a number: it names none"
        raise ConfigError(f"{key}: got {name!r}, expected {among}")
    factor, offset = known[name]
    return float(factor), float(offset)


class _Round:
    """The calls of one rollout: what rewards say of all its images, in order."""

    def __init__(
        self,
        rewards: Mapping[str, KeyedReward],
        around: Callable[[], AbstractContextManager[None]],
        group: Sequence[int] | None,
    ) -> None:
        self.rewards, self.around, self.group = rewards, around, group
        self.prompts: list[Prompt] = []
        self.drawn: list[Tensor] = []
        """Of each batch, which images `are_finite`."""
        self.answers: dict[str, list[Answer | Begun]] = {name: [] for name in rewards}
        self.threads = Threads()
        self._held: list[Tensor] = []
        """Images from `_first` on, for rewards that see whole groups."""
        self._first = 0
        self._begun: list[Begun] = []

    def add(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        first = len(self.prompts)
        self.prompts += prompts
        self.drawn.append(are_finite(images))
        self._ask([n for n, r in self.rewards.items() if not r.by_group], images, first)
        by_group = [name for name, reward in self.rewards.items() if reward.by_group]
        if by_group:
            self._held.append(images)
            count = self._whole() - self._first
            images = torch.cat(self._held)
            self._held = [images[count:]] if count < len(images) else []
            if count:
                self._ask(by_group, images[:count], self._first)
                self._first += count

    def _whole(self) -> int:
        """How many images there are whose groups are whole."""
        end, group = len(self.prompts), self.group
        while group is not None and self._first < end < len(group) and group[end] == group[end - 1]:
            end -= 1
        return end

    def _ask(self, names: Sequence[str], images: Tensor, first: int) -> None:
        """Of images from number `first` on."""
        prompts = self.prompts[first : first + len(images)]
        places = range(first, first + len(images))
        for name in names:
            reward = self.rewards[name]
            seen = _on_host(images, reward.takes_bytes) if reward.overlaps else images
            group = [i if self.group is None else self.group[i] for i in places]
            call = Call.of(reward, seen, prompts, group)
            with self.around():
                if reward.overlaps:
                    self._begin(name, call)
                else:
                    self.answers[name].append(call.ask())

    def _begin(self, name: str, call: Call) -> None:
        while self._begun and (self._begun[0].is_done() or len(self._begun) >= AHEAD):
            self._begun.pop(0).wait()
        self._begun.append(self.threads.begin(call))
        self.answers[name].append(self._begun[-1])

    def end(self) -> dict[str, list[Answer]]:
        """All answers."""
        with self.around():
            for (
                begun
            ) in self._begun:  # in their order: one that hangs may keep others from beginning
                begun.wait()
            return {
                name: [one.wait() if isinstance(one, Begun) else one for one in answers]
                for name, answers in self.answers.items()
            }

    def on_host(
        self, answers: Mapping[str, Sequence[Answer]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores by name, and what is reported beside by "name/entry". Here the device is waited
        for, and else only by rewards; raises RewardError for images that are not finite."""
        columns = {None: torch.cat(self.drawn).double()}
        columns |= {n: torch.cat([part.scores for part in parts]) for n, parts in answers.items()}
        for name, parts in answers.items():
            for entry in dict.fromkeys(entry for part in parts for entry in part.info):
                of = [p.info.get(entry, torch.full_like(p.scores, torch.nan)) for p in parts]
                columns[name, entry] = torch.cat(of)
        device = columns[None].device
        host = dict(
            zip(columns, torch.stack([x.to(device) for x in columns.values()]).cpu(), strict=True)
        )
        texts = [prompt["prompt"] for prompt in self.prompts]
        require_drawn(host[None].bool(), texts)
        scores = {name: host[name] for name in answers}
        return scores, {"/".join(key): x for key, x in host.items() if isinstance(key, tuple)}

    def require_drawn(self) -> None:
        texts = [prompt["prompt"] for prompt in self.prompts]
        require_drawn(torch.cat(self.drawn), texts)


def _on_host(images: Tensor, in_bytes: bool) -> Tensor:
    """Images that leave for elsewhere; as bytes a quarter crosses and waits."""
    if in_bytes:
        with suppress(ValueError):  # the reward says what is wrong with them
            images = as_bytes(images)
    return images.cpu()


def score(
    rewards: Mapping[str, KeyedReward],
    batches: Iterable[tuple[Tensor, Sequence[Prompt]]],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    group: Sequence[int] | None = None,
) -> Scores:
    """Every reward of the images of batches (images, prompts), and what is optimized.

    A reward that says that it overlaps is asked in other threads while the next batches are made,
    with images on the host, in bytes where it takes them; all others one after another. Every
    reward gets images, texts and metadata of its own, to write into as it likes. around: makes what
    each call runs in. group: a number for each image, all of one number in a row: rewards that take
    it see whole groups.

    The host waits in the end. Raises what `Call.ask` does, and RewardError for images that are not
    finite, and for a score that is above 1e150 in size or, unless its reward may leave an image
    out, not finite, naming the image by its place in all batches.
    """
    asked = _Round(rewards, around, group)
    try:
        for images, prompts in batches:
            asked.add(images, prompts)
        answers = asked.end()
    except RewardError:
        asked.require_drawn()  # then it is not the reward's fault
        raise
    finally:
        asked.threads.close()
    values, info = asked.on_host(answers)
    reasons = {n: p.reason for n, parts in answers.items() for p in reversed(parts) if p.reason}
    may_fail = frozenset(n for n, reward in rewards.items() if reward.may_be_nan or n in reasons)
    for name, reward in rewards.items():
        whole = [torch.full((len(p.scores),), p.reason is not None) for p in answers[name]]
        may_be_none = torch.cat(whole) | reward.may_be_nan
        way_out = f"; with {reward.key}.allow_nan=true a NaN leaves its image out"
        _check(reward.key, values[name], asked.prompts, may_be_none, way_out)
    optimized = {name: reward for name, reward in rewards.items() if reward.weight}
    mean = sum(reward.weight * reward.scaled(values[n]) for n, reward in optimized.items())
    has_none = torch.stack([values[name] for name in optimized]).isnan().any(0)
    _check("reward: the weighted sum", mean, asked.prompts, has_none)
    return Scores({MEAN: mean} | values, info, may_fail, reasons)


def are_finite(images: Tensor) -> Tensor:
    """(B,) bool, of images or videos."""
    return images.flatten(1).isfinite().all(1)


def require_drawn(finite: Tensor, prompts: Sequence[str]) -> None:
    """Raise RewardError where not all `are_finite`: a reward that casts to bytes scores black."""
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"model: {len(bad)} of {counted(len(finite), 'image')} "
            f"{'is' if len(bad) == 1 else 'are'} not finite, the first of prompt "
            f"{prompts[bad[0]]!r:.80}; expected weights of numbers, and a "
            "train.mixed_precision that holds what the network computes (bf16 where fp16 overflows)"
        )


def _check(
    key: str, value: Tensor, prompts: Sequence[Prompt], may_be_none: Tensor, way_out: str = ""
) -> None:
    """may_be_none: (B,) bool, where NaN is no mistake. way_out: what else to say of a NaN."""
    is_fine = (value.abs() <= LARGEST) | (value.isnan() & may_be_none)
    bad = (~is_fine).nonzero().flatten().tolist()
    if bad:
        others = f", and of {counted(len(bad) - 1, 'other')}" if bad[1:] else ""
        first, text = value[bad[0]].item(), prompts[bad[0]]["prompt"]
        raise RewardError(
            f"{key}: {first:g} for image {bad[0]} of {len(value)}, prompt {text!r:.80}{others}; "
            f"expected finite numbers up to {LARGEST:g} in size{way_out if first != first else ''}"
        )
