"""Credit: rewards of groups become advantages. B samples; plain torch, in float64.

A = clamp((r - mean of its group) / (std + eps), -limit, limit)

P prompts, L leaves of each, C choices that are trained (edges, or points over the leaves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowkern.rollout.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Credit:
    """How the rewards of leaves become one advantage per choice."""

    eps: float = 1e-4
    """Added to the standard deviation."""
    limit: float = 5.0
    """Advantages are clamped to +-this, after all sums."""
    scale: float = 1.0
    """Multiplies them in the end."""
    global_std: bool = False
    """Divide by the standard deviation of all rewards instead of the group's own."""
    unbiased: bool = False
    """Divide the squares by n - 1 instead of n."""
    trimmed_ratio: float = 0.0
    """The share of a group, its lowest rewards, that mean and std leave out."""
    best_of: int | None = None
    """Train on this many of a group, half of them the best, half the worst; None: on all."""
    mix: Literal["reward", "advantage", "sum"] = "reward"
    """Several rewards: one advantage of their weighted sum, or the weighted mean (weights over the
    sum of their sizes, so that a negative one stays a penalty) or sum of their own."""
    over_leaves: Literal["sum", "mean"] = "sum"
    """A choice gets the sum or the mean of the advantages of the leaves it leads to."""

    def __call__(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor:
        """Advantages (P, C) float64 of rewards (P, L) by name; the weighted ones count.

        Raises ValueError for rewards that are not finite.
        """
        group = _groups(plan, len(scores[next(iter(weights))]))
        options = {
            "global_std": self.global_std, "unbiased": self.unbiased, "eps": self.eps,
            "trimmed_ratio": self.trimmed_ratio,
        }  # fmt: skip
        if self.mix == "reward":
            parts = [(1.0, sum(w * scores[name].double() for name, w in weights.items()))]
        else:
            total = sum(map(abs, weights.values())) if self.mix == "advantage" else 1.0
            parts = [(w / total, scores[name]) for name, w in weights.items()]
        leaf = sum(
            weight * group_advantage(reward.flatten(), group.flatten(), **options)
            for weight, reward in parts
        )
        kept = torch.ones_like(leaf)
        if self.best_of is not None:
            kept = keep_extremes(leaf, group.flatten(), self.best_of)
        leaf, kept = (leaf * (kept > 0)).view(group.shape), kept.view(group.shape)
        if plan.points:
            leaf_of = [leaf_of for leaf_of, _ in plan.points]
            choice, kept = leaf[:, leaf_of], kept[:, leaf_of]
        else:
            below = plan.below().to(leaf).T
            mean = below / below.sum(0)
            choice = leaf @ (mean if self.over_leaves == "mean" else below)
            # Of a choice's leaves, those that are kept speak for it.
            kept = (kept @ below) / ((kept > 0).to(leaf) @ below).clamp(min=1)
        return choice.clamp(-self.limit, self.limit) * self.scale * kept


def group_advantage(
    reward: Tensor,
    group: Tensor,
    *,
    global_std: bool = False,
    unbiased: bool = False,
    eps: float = 1e-4,
    trimmed_ratio: float = 0.0,
) -> Tensor:
    """Advantages (B,) float64 of rewards (B,) within groups; group: (B,) integer keys in any order.

    The options are `Credit`'s. A group of one has std 0 either way. Without trimming, advantages
    of a group sum to 0. Meant for the host: a few numbers per rollout, whose values are looked at.
    Raises ValueError for rewards that are not finite: a mean would spread them over the group.
    """
    _check(reward, group)
    value = reward.double()
    size = _size(group)
    dropped = (size.double() * trimmed_ratio + 1e-9).floor()
    dropped = dropped.minimum(size - 1.0)  # never a whole group
    counts = _rank(value, group) >= dropped
    mean, std, index = _statistics(value, group, unbiased, counts)
    if global_std:
        spread = _statistics(value, torch.zeros_like(group), unbiased, counts)[1]
    else:
        spread = std[index]
    return (value - mean[index]) / (spread + eps)


def keep_extremes(advantage: Tensor, group: Tensor, count: int) -> Tensor:
    """What to multiply advantages (B,) with to train on the best and the worst count / 2 of every
    group, (B,).

    Not 1 for those kept, but such that a mean over the group is a mean over them.
    """
    size, rank = _size(group), _rank(advantage, group)
    if count % 2 or bool((size < count).any()):
        raise ValueError(
            f"best_of: got {count}, expected an even number, at most the {int(size.min())} of a "
            "group"
        )
    is_kept = (rank < count // 2) | (rank >= size - count // 2)
    return torch.where(is_kept, size / count, 0.0).to(advantage)


def zero_std_ratio(reward: Tensor, plan: Plan) -> Tensor:
    """The share of groups whose rewards (P, L) are all equal, (): they teach nothing."""
    value, group = reward.double().flatten(), _groups(plan, len(reward)).flatten()
    everything = torch.ones_like(value, dtype=torch.bool)
    return (_statistics(value, group, False, everything)[1] == 0).double().mean()


def _groups(plan: Plan, prompts: int) -> Tensor:
    """(P, L): a number for every group of every prompt."""
    tags = torch.tensor(plan.groups)
    return torch.arange(prompts)[:, None] * (int(tags.max()) + 1) + tags


def _size(group: Tensor) -> Tensor:
    """How many samples each sample's group has, (B,)."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    return count[index]


def _rank(value: Tensor, group: Tensor) -> Tensor:
    """The place of each sample in its group, from the lowest value, (B,)."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    order = value.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]
    place = torch.arange(len(value)) - (count.cumsum(0) - count)[index[order]]
    return torch.empty_like(place).index_put((order,), place)


def _statistics(
    value: Tensor, group: Tensor, unbiased: bool, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (G,) and standard deviation (G,) per group of those that count, and each one's group."""
    keys, index = torch.unique(group, return_inverse=True)
    total = value.new_zeros(len(keys))
    number = total.index_add(0, index, counts.to(value))
    # Shifted by one value of the group, so that equal rewards give a std of exactly 0.
    origin = total.index_put((index[counts],), value[counts])
    shifted = torch.where(counts, value - origin[index], 0.0)
    mean = total.index_add(0, index, shifted) / number
    square = torch.where(counts, shifted - mean[index], 0.0).square()
    variance = total.index_add(0, index, square) / (number - int(unbiased)).clamp(min=1)
    return origin + mean, variance.sqrt(), index


def _check(reward: Tensor, group: Tensor) -> None:
    if reward.ndim != 1 or reward.shape != group.shape:
        raise ValueError(
            f"group: got shape {tuple(group.shape)} for reward {tuple(reward.shape)}, "
            "expected (B,) for both"
        )
    if group.is_floating_point():
        raise TypeError(f"group: got {group.dtype}, expected integer keys")
    bad = (~torch.isfinite(reward)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"reward: got {float(reward[bad[0]])} for sample {bad[0]} ({len(bad)} of {len(reward)} "
            "are not finite); expected finite rewards"
        )
