"""The metrics of a run: sums over micro-batches, and a record per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowkern.rl.objectives import Outcome
from flowkern.train.distributed import Laps


class Sums:
    """Of an optimizer step's micro-batches, on the device: the loss, the statistics, and how many
    choices they are of, as those that teach nothing are left out.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._parts: list[Tensor] = []
        self._some: dict[tuple[str, ...], Tensor] = {}

    def add(self, out: Outcome) -> None:
        self._names = list(out.statistics)
        values = [out.loss, *out.statistics.values()]
        sums = [value.detach().float().sum() for value in values]
        count = len(values[-1])
        self._parts.append(torch.stack([*sums, torch.full_like(sums[0], count)]))
        for names, pairs in out.parts:
            self._some[names] = self._some.get(names, 0) + pairs

    def over(self, total: float) -> Tensor:
        """The sums divided by the number of choices, those left out included: to be reduced over
        processes.
        """
        some = [pairs.flatten() for pairs in self._some.values()]
        return torch.cat([sum(self._parts) / total, *some])

    def named(self, values: list[float]) -> tuple[float, dict[str, float]]:
        """Of the numbers that `over` became: the loss, and the means of what was trained; none
        where nothing was."""
        end = len(self._names) + 2
        (loss, *found, trained), some = values[:end], values[end:]
        if trained == 0:
            return loss, {}
        means = {n: value / trained for n, value in zip(self._names, found, strict=True)}
        names = [name for names in self._some for name in names]
        pairs = zip(names, some[::2], some[1::2], strict=True)
        return loss, means | {name: total / count for name, total, count in pairs if count}


@dataclass(frozen=True)
class Experience:
    """What a Task collects, as far as the loop reports it; a Task's own has more."""

    figures: Mapping[str, float]
    """Of all ranks: reported with the first optimizer step."""
    every: Mapping[str, float]
    """Reported with each of them."""
    laps: Laps
    """Of the network's calls, marked where the rollout ended and where the rewards did."""
    samples: int
    """What was made, on all ranks."""
    unit: str
    """Of `samples`: "images"."""
    left_out: int = field(default=0, kw_only=True)
    """Of `samples`, those that no reward could be had of, and nothing is learned from."""
    reasons: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Why something has no score, by reward, also of those that are only reported."""


def spread(
    scores: Mapping[str, Tensor], weights: Mapping[str, float], advantage: Tensor, most: float
) -> dict[str, float]:
    """What a rollout's rewards leave to learn: the standard deviation of what is optimized among
    the images of a prompt, its mean over prompts; and the share of advantages that are at `most`.
    scores: (P, L) by name, NaN where one failed; advantage: NaN where one takes no part.
    """
    reward = sum(weight * scores[name].double() for name, weight in weights.items())
    mean = reward.nanmean(1, keepdim=True)
    std = (reward - mean).square().nanmean(1).sqrt()
    there = advantage[~advantage.isnan()]
    clipped = (there.abs() >= most * (1 - 1e-12)).double()
    return {"group_std": std.nanmean().item(), "adv_clip_ratio": clipped.nanmean().item()}


@dataclass
class Progress:
    """An iteration under way, as far as it will be reported."""

    experience: Experience
    is_first: bool
    """Does the iteration's first optimizer step belong to `updates`? It reports the rollout."""
    updates: list[dict[str, float]] = field(default_factory=list)
    """What the finished optimizer steps report."""
    sampled: int = 0
    """Calls of the network in the rollout, on all ranks; known from its first optimizer step on."""
    trained: list[int] = field(default_factory=list)
    """The same in each finished optimizer step."""

    def calls(self) -> Sequence[int]:
        """Of the network, of this process: in the rollout, and since the last optimizer step."""
        return self.experience.laps.counts()[0], self.experience.laps.counted()


def records(progress: Progress, per_rollout: int) -> list[dict[str, float]]:
    """A record per finished optimizer step, of the `per_rollout` that an iteration has."""
    experience = progress.experience
    rollout, reward, *train = experience.laps.seconds()
    total = rollout + reward + per_rollout * sum(train) / len(train)
    first = {
        **experience.figures,
        "nfe/sample": progress.sampled,
        "timing_s/rollout": rollout,
        "timing_s/reward": reward,
        f"throughput/{experience.unit}_per_s": experience.samples / total,
    }
    found = []
    parts = zip(progress.updates, train, progress.trained, strict=True)
    for i, (update, seconds, trained) in enumerate(parts):
        tells_rollout = i == 0 and progress.is_first
        found.append(update | (first if tells_rollout else {}))
        found[-1] |= {
            "nfe/train": trained,
            **experience.every,
            "timing_s/train": seconds,
            "timing_s/step": seconds + (rollout + reward if tells_rollout else 0),
        }
    return found
