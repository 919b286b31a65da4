"""Credit: rewards of groups become advantages. B samples; plain torch, in float64.

A = clamp((r - mean of its group) / (std + eps), -limit, limit), and 0 where std < min_std: what is
left there is rounding, and dividing by eps would make it a direction. Undivided as an option.

A leaf without a score (NaN) is as if it had never been sampled: it counts in no mean, std, group or
rank, and what leads to no other leaf takes no part in training.

P prompts, L leaves of each, C choices that are trained (edges, or points over the leaves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowkern.rl.recipe import RewardAggregation
from flowkern.rollout.plan import Plan

LARGEST = 1e150
"""Of a reward, in size: its square is still a float64."""


@dataclass(frozen=True, kw_only=True)
class Credit:
    """How the rewards of leaves become one advantage per choice."""

    eps: float = 1e-4
    """Added to the standard deviation."""
    min_std: float = 1e-6
    """A group whose standard deviation is below this, in units of the reward, teaches nothing."""
    limit: float = 5.0
    """Advantages are clamped to +-this, after all sums."""
    scale: float = 1.0
    """Multiplies them in the end."""
    global_std: bool = False
    """Divide by the standard deviation of all rewards instead of the group's own."""
    scale_rewards: bool = True
    """False: nothing is divided by a standard deviation."""
    unbiased: bool = False
    """Divide the squares by n - 1 instead of n."""
    trimmed_ratio: float = 0.0
    """The share of a group, its lowest rewards, that mean and std leave out."""
    best_of: int | None = None
    """Train on this many of a group, half of them the best, half the worst; None: on all."""
    multi_objective_aggregation: RewardAggregation = "sum_then_normalize"
    """Several rewards: see there."""
    over_leaves: Literal["sum", "mean"] = "sum"
    """A choice gets the sum or the mean of the advantages of the leaves it leads to."""

    def __call__(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor:
        """Advantages (P, C) float64 of rewards (P, L) by name; the weighted ones count.

        NaN stands for no score, and then for no advantage: of a choice that leads to no scored
        leaf, which is not the advantage 0. Raises what `group_advantage` does.
        """
        group = _groups(plan, len(scores[next(iter(weights))]))
        compared, there = self._compared(scores, weights)
        of = group.flatten()[there]
        scored = sum(weight * _normalised(reward, of, self)[0] for weight, reward in compared)
        leaf = scored.new_zeros(group.numel())
        kept = leaf.masked_fill(there, 1.0)
        if self.best_of is not None:
            kept[there] = self._extremes(scored, of, _size(group.flatten())[there])
        leaf = leaf.masked_scatter(there, scored * (kept[there] > 0)).view(group.shape)
        kept, there = kept.view(group.shape), there.view(group.shape)
        leaf, there = self.shaped(leaf, there, scores, plan), there.to(leaf)
        choice, leads = of_leaves(leaf, plan), of_leaves(there, plan)
        if self.over_leaves == "mean":
            choice = choice / leads.clamp(min=1)
        # Of a choice's leaves, those that are kept speak for it.
        kept = of_leaves(kept, plan) / of_leaves((kept > 0).to(leaf), plan).clamp(min=1)
        choice = choice.clamp(-self.limit, self.limit) * self.scale * kept
        return choice.masked_fill(leads == 0, torch.nan)

    @property
    def asks(self) -> Mapping[str, Sequence[str]]:
        """The rewards that it looks at beside those with a weight, by the option that names
        them."""
        return {}

    def shaped(
        self, leaf: Tensor, there: Tensor, scores: Mapping[str, Tensor], plan: Plan
    ) -> Tensor:
        """The advantages of leaves (P, L), before they are summed over those of a choice; there:
        (P, L) bool, those that have one."""
        return leaf

    def kl_weight(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor | None:
        """(P, C) float64, from 0: what the KL of each choice counts, times its coefficient; None:
        1."""
        return None

    def _extremes(self, advantage: Tensor, group: Tensor, size: Tensor) -> Tensor:
        """`keep_extremes`, and all of a group that has lost so many of its `size` that no more are
        left than are kept."""
        kept, left = torch.ones_like(advantage), _size(group)
        asked = (left >= self.best_of) | (left == size)
        kept[asked] = keep_extremes(advantage[asked], group[asked], self.best_of)
        return kept

    def zero_std_ratio(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> float:
        """The share of groups that teach nothing: no reward that is compared has a std in them. Of
        the groups in which something has a score; 1 where there is none.
        """
        compared, there = self._compared(scores, weights)
        group = _groups(plan, len(scores[next(iter(weights))])).flatten()[there]
        is_flat = torch.stack([_normalised(r, group, self)[1] for _, r in compared]).all(0)
        keys, index = torch.unique(group, return_inverse=True)
        if not len(keys):
            return 1.0
        return float(is_flat.new_zeros(len(keys)).index_put((index,), is_flat).double().mean())

    def _compared(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> tuple[list[tuple[float, Tensor]], Tensor]:
        """What groups are compared by: rewards (B,) and what their advantages count; and which of
        the P * L leaves these are of, (P * L,) bool: those that no weighted reward left out."""
        weights = {name: weight for name, weight in weights.items() if weight}
        rewards = {name: _real(scores[name]).flatten() for name in weights}
        there = ~torch.stack(list(rewards.values())).isnan().any(0)
        rewards = {name: reward[there] for name, reward in rewards.items()}
        if self.multi_objective_aggregation == "sum_then_normalize":
            return [(1.0, sum(weights[name] * reward for name, reward in rewards.items()))], there
        is_mean = self.multi_objective_aggregation == "normalize_then_mean"
        total = sum(map(abs, weights.values())) if is_mean else 1.0
        return [(weights[name] / total, reward) for name, reward in rewards.items()], there


def group_advantage(
    reward: Tensor,
    group: Tensor,
    *,
    global_std: bool = False,
    scale_rewards: bool = True,
    unbiased: bool = False,
    eps: float = 1e-4,
    min_std: float = 1e-6,
    trimmed_ratio: float = 0.0,
) -> Tensor:
    """Advantages (B,) float64 of rewards (B,) within groups; group: (B,) integer keys in any order.

    The options are `Credit`'s. Exactly 0 in a group whose standard deviation, or the one divided
    by, is 0 or below min_std; a group of one has std 0 either way. Without trimming, advantages of
    a group sum to 0. Rewards of any real dtype are compared in float64, as differences within
    their group, so that 1e6 + 0.01 x teaches what x does. Meant for the host: a few numbers per
    rollout, whose values are looked at.
    Raises TypeError for complex rewards or float keys, and ValueError for rewards that are not
    finite or above 1e150 in size: a mean would spread them over the group.
    """
    options = Credit(
        global_std=global_std, scale_rewards=scale_rewards, unbiased=unbiased, eps=eps,
        min_std=min_std, trimmed_ratio=trimmed_ratio,
    )  # fmt: skip
    return _normalised(reward, group, options)[0]


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


def of_leaves(value: Tensor, plan: Plan) -> Tensor:
    """(P, C) sums of values (P, L) over the leaves that each choice leads to."""
    if plan.points:
        return value[:, [position for position, _ in plan.points]]
    return value @ plan.below().to(value).T


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


def _normalised(reward: Tensor, group: Tensor, options: Credit) -> tuple[Tensor, Tensor]:
    """Advantages (B,) before the limit, and whether each one's group teaches nothing (B,)."""
    value, size = _real(reward), _size(group)
    _check(value, group)
    dropped = (size.double() * options.trimmed_ratio + 1e-9).floor()
    dropped = dropped.minimum(size - 1.0)  # never a whole group
    counts = _rank(value, group) >= dropped
    difference, std = _statistics(value, group, options.unbiased, counts)
    spread = std
    if options.global_std:
        spread = _statistics(value, torch.zeros_like(group), options.unbiased, counts)[1]
    smallest = std.minimum(spread)
    is_flat = (smallest == 0) | (smallest < options.min_std)
    divided_by = spread + options.eps if options.scale_rewards else 1.0
    return torch.where(is_flat, 0.0, difference / divided_by), is_flat


def _statistics(
    value: Tensor, group: Tensor, unbiased: bool, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Each sample's value - mean of its group (B,) and std of that (B,), over those that count."""
    keys, index = torch.unique(group, return_inverse=True)
    total = value.new_zeros(len(keys))
    number = total.index_add(0, index, counts.to(value))
    # Shifted by the group's least value: equal rewards give a std of exactly 0, and large ones
    # keep what tells them apart.
    countable = torch.where(counts, value, torch.inf)
    origin = total.scatter_reduce(0, index, countable, "amin", include_self=False)
    shifted = value - origin[index]
    mean = total.index_add(0, index, torch.where(counts, shifted, 0.0)) / number
    difference = shifted - mean[index]
    square = torch.where(counts, difference, 0.0).square()
    variance = total.index_add(0, index, square) / (number - int(unbiased)).clamp(min=1)
    return difference, variance.sqrt()[index]


def _real(reward: Tensor) -> Tensor:
    """In float64, which would drop the imaginary part without a word."""
    if reward.is_complex():
        raise TypeError(f"reward: got {reward.dtype}, expected real numbers")
    return reward.double()


def _check(reward: Tensor, group: Tensor) -> None:
    if reward.ndim != 1 or reward.shape != group.shape:
        raise ValueError(
            f"group: got shape {tuple(group.shape)} for reward {tuple(reward.shape)}, "
            "expected (B,) for both"
        )
    if group.is_floating_point() or group.is_complex():
        raise TypeError(f"group: got {group.dtype}, expected integer keys")
    bad = (~(reward.abs() <= LARGEST)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"reward: got {float(reward[bad[0]])} for sample {bad[0]} ({len(bad)} of {len(reward)} "
            f"are not finite or too large); expected finite rewards up to {LARGEST:g} in size"
        )
