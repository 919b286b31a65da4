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
    """Each reward is first made the share of its group that an image beats, a tie counting half."""

    def __call__(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor:
        return super().__call__(win_rates(scores, weights, plan), weights, plan)

    def zero_std_ratio(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> float:
        return super().zero_std_ratio(win_rates(scores, weights, plan), weights, plan)


def win_rates(
    scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
) -> dict[str, Tensor]:
    """(P, L) float64 in [0, 1] by name, of the weighted rewards (P, L) by name.

    An image that lacks one of them (NaN) has no rate, and is no opponent. One without an opponent
    has 1/2.
    """
    scores = {name: scores[name].double() for name, weight in weights.items() if weight}
    there = ~torch.stack(list(scores.values())).isnan().any(0)
    tag = torch.tensor(plan.groups)
    meets = (tag[:, None] == tag) & ~torch.eye(len(tag), dtype=torch.bool)
    meets = meets & there[:, :, None] & there[:, None]  # (P, L, L)
    count = meets.sum(2)

    def rates(score: Tensor) -> Tensor:
        beats = (score[:, :, None] - score[:, None]).sign() / 2 + 0.5
        wins = torch.where(meets, beats, 0.0).sum(2)
        rate = torch.where(count > 0, wins / count.clamp(min=1), 0.5)
        return rate.masked_fill(~there, torch.nan)

    return {name: rates(score) for name, score in scores.items()}
