"""Credit by win rates: how many of its group an image beats, in place of by how much.

P prompts, L leaves of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkern.rl.advantage import Credit
from flowkern.rollout.plan import Plan


@dataclass(frozen=True, kw_only=True)
class WinRate(Credit):
    """Each reward is first made the share of its group that an image beats, a tie counting half.
    Rewards that are no further apart than min_std are tied: their order is rounding's."""

    def __call__(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor:
        return super().__call__(self._rates(scores, weights, plan), weights, plan)

    def zero_std_ratio(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> float:
        return super().zero_std_ratio(self._rates(scores, weights, plan), weights, plan)

    def _rates(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> dict[str, Tensor]:
        weighted = {name: scores[name].double() for name, weight in weights.items() if weight}
        return win_rates(weighted, plan, self.min_std)


def win_rates(scores: Mapping[str, Tensor], plan: Plan, tie: float = 0.0) -> dict[str, Tensor]:
    """(P, L) float64 in [0, 1] by name, of rewards (P, L) by name; tie: how far apart they are one.

    An image that lacks one of them (NaN) has no rate, and is no opponent. One without an opponent
    has 1/2.
    """
    there = ~torch.stack(list(scores.values())).isnan().any(0)
    tag = torch.tensor(plan.groups)
    meets = (tag[:, None] == tag) & ~torch.eye(len(tag), dtype=torch.bool)
    meets = meets & there[:, :, None] & there[:, None]  # (P, L, L)
    count = meets.sum(2)

    def rates(score: Tensor) -> Tensor:
        ahead = score[:, :, None] - score[:, None]
        beats = torch.where(ahead.abs() <= tie, 0.5, (ahead > 0).to(score))
        wins = torch.where(meets, beats, 0.0).sum(2)
        rate = torch.where(count > 0, wins / count.clamp(min=1), 0.5)
        return rate.masked_fill(~there, torch.nan)

    return {name: rates(score) for name, score in scores.items()}
