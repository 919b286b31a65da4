"""The metrics of a run: sums over micro-batches, and a record per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def records(
    scores: Mapping[str, Tensor],
    updates: Sequence[dict[str, float]],
    laps: Laps,
    released_rows: tuple[int, int],
    world: int,
) -> list[dict[str, float]]:
    """What the optimizer steps `updates` of an iteration report; the rollout's in the first.

    laps: of the rollout, the rewards, and each optimizer step. released_rows: of the authors' loop.
    """
    (rollout, reward, *train), (sampled, _, *trained) = laps.seconds(), laps.counts()
    first = {f"reward/{name}": value.double().mean().item() for name, value in scores.items()}
    first |= {
        "nfe/sample": sampled * world,
        "nfe/naive_sample": released_rows[0],
        "timing_s/rollout": rollout,
        "timing_s/reward": reward,
        "throughput/images_per_s": scores["mean"].numel() / (rollout + reward + sum(train)),
    }
    found = []
    for i, (update, seconds, rows) in enumerate(zip(updates, train, trained, strict=True)):
        found.append(update | (first if i == 0 else {}))
        found[-1] |= {
            "nfe/train": rows * world,
            "nfe/naive_train": released_rows[1] // len(updates),
            "timing_s/train": seconds,
            "timing_s/step": seconds + (rollout + reward if i == 0 else 0),
        }
    return found
