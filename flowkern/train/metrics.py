"""The metrics of a run: sums over micro-batches, and a record per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowkern.ops.policy_loss import PolicyLoss
from flowkern.train.distributed import Laps

STATISTICS = ("loss", "ratio_mean", "pg_clipfrac_higher", "pg_clipfrac_lower", "kl", "trained")
"""The last is how many choices went through the network: those that teach nothing are left out."""


def summed(out: PolicyLoss) -> Tensor:
    """STATISTICS over the choices of a micro-batch, on the device."""
    parts = (out.loss, out.ratio, out.clipped_high, out.clipped_low, out.kl)
    sums = [part.detach().float().sum() for part in parts]
    return torch.stack([*sums, torch.full_like(sums[0], len(out.ratio))])


@dataclass
class Progress:
    """An iteration under way, as far as it will be reported."""

    rewards: Mapping[str, float]
    """What the rollout's images, of all ranks, are worth."""
    images: int
    laps: Laps
    """The rollout, the rewards, and each of `updates`."""
    released: tuple[int, int]
    """Rows forward of the authors' loop, of all ranks: in sampling, in training."""
    is_first: bool
    """Does the iteration's first optimizer step belong to `updates`? It reports the rollout."""
    updates: list[dict[str, float]] = field(default_factory=list)
    """What the finished optimizer steps report."""


def records(progress: Progress, per_rollout: int, world: int) -> list[dict[str, float]]:
    """A record per finished optimizer step, of the `per_rollout` that an iteration has."""
    laps = progress.laps
    (rollout, reward, *train), (sampled, _, *trained) = laps.seconds(), laps.counts()
    sampling_rows, training_rows = progress.released
    total = rollout + reward + per_rollout * sum(train) / len(train)
    first = {
        **progress.rewards,
        "nfe/sample": sampled * world,
        "nfe/naive_sample": sampling_rows,
        "timing_s/rollout": rollout,
        "timing_s/reward": reward,
        "throughput/images_per_s": progress.images / total,
    }
    found = []
    for i, (update, seconds, rows) in enumerate(zip(progress.updates, train, trained, strict=True)):
        tells_rollout = i == 0 and progress.is_first
        found.append(update | (first if tells_rollout else {}))
        found[-1] |= {
            "nfe/train": rows * world,
            "nfe/naive_train": training_rows // per_rollout,
            "timing_s/train": seconds,
            "timing_s/step": seconds + (rollout + reward if tells_rollout else 0),
        }
    return found
