"""Credit that says what the KL of each choice counts, beside its advantage.

P prompts, L leaves of each, C choices that are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkern.rl.advantage import Credit, _groups, of_leaves
from flowkern.rollout.plan import Plan


@dataclass(frozen=True, kw_only=True)
class RewardKL(Credit):
    """The KL counts most for the best: 1 where the advantage is 1, `least` where it is -1.

    For advantages in [-1, 1], those whose scale is 1 / limit.
    """

    least: float = 0.0

    def kl_weight(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor:
        advantage = self(scores, weights, plan)
        return self.least + (1 - self.least) * (0.5 + 0.5 * advantage).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class UncertainKL(Credit):
    """The KL counts for the leaves alone whose reward is least to be trusted, and what is good
    learns more the less it is like the others of its group.

    How uncertain a leaf is: the share of all leaves of the rollout that its reward, the one that is
    optimized, beats, less the mean of the same shares of the auxiliary rewards.
    """

    auxiliary_rewards: Sequence[str]
    """By name, larger is better; one that has no score of a leaf (NaN) is not asked there."""
    kl_share: float = 0.1
    """Of the leaves, the most uncertain ones: those above this quantile, and none that ties with
    it; 1: all."""
    diversity_reward: str | None = None
    """By name: how far a leaf is from its group. A positive advantage is multiplied with it, over
    its mean in the group; None: with 1."""

    def __post_init__(self) -> None:
        if not self.auxiliary_rewards:
            raise ValueError("auxiliary_rewards: got none, expected the name of one or more")

    @property
    def asks(self) -> Mapping[str, Sequence[str]]:
        apart = [] if self.diversity_reward is None else [self.diversity_reward]
        return {"auxiliary_rewards": self.auxiliary_rewards, "diversity_reward": apart}

    def shaped(
        self, leaf: Tensor, there: Tensor, scores: Mapping[str, Tensor], plan: Plan
    ) -> Tensor:
        if self.diversity_reward is None:
            return leaf
        apart, group = scores[self.diversity_reward].double(), _groups(plan, len(leaf))
        known = there & ~apart.isnan()
        none = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
        total = none.index_add(0, group[known], apart[known])
        mean = (total / group[known].bincount(minlength=len(none)).clamp(min=1))[group]
        factor = torch.where(known & (mean > 0), apart / mean, 1.0)
        return torch.where(leaf > 0, leaf * factor, leaf)

    def kl_weight(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor:
        compared, there = self._compared(scores, weights)
        own = _wins(sum(weight * reward for weight, reward in compared), self.min_std)
        others = [scores[name].double().flatten()[there] for name in self.auxiliary_rewards]
        uncertain = own - torch.stack([_wins(x, self.min_std) for x in others]).nanmean(0)
        uncertain = uncertain.round(decimals=9)  # equal differences of shares are equal
        known = uncertain[~uncertain.isnan()]
        is_some = len(known) and self.kl_share < 1
        least = known.quantile(1 - self.kl_share) if is_some else -torch.inf
        shape = len(scores[next(iter(weights))]), len(plan.groups)
        is_gated = torch.zeros(there.shape, dtype=torch.float64)
        is_gated = is_gated.masked_scatter(there, (uncertain > least).double()).view(shape)
        leads = of_leaves(there.double().view(shape), plan)
        return of_leaves(is_gated, plan) / leads.clamp(min=1)


def _wins(value: Tensor, tie: float) -> Tensor:
    """(B,): the share of values (B,) that each is ahead of, by more than `tie`; NaN of NaN."""
    known = value[~value.isnan()].sort().values
    ahead = torch.searchsorted(known, value - tie).double() / max(1, len(known))
    return ahead.masked_fill(value.isnan(), torch.nan)
