"""Credit of trees, by depth: what a choice is worth is compared with the choices of its depth.

P prompts, L leaves of each, E choices that are trained (edges).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowkern.rl.advantage import Credit, _check, _groups, _normalised
from flowkern.rollout.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ByDepth(Credit):
    """A = (w - mean) / (std + eps) over the choices of a prompt that are equally many steps from
    the root, w being what each is `worth`; 0 where one is alone."""

    over_leaves: Literal["mean"] = "mean"

    def __post_init__(self) -> None:
        if self.best_of is not None or self.over_leaves != "mean":
            raise ValueError(
                f"best_of, over_leaves: got {self.best_of} and {self.over_leaves!r}, expected None "
                "and 'mean': choices are compared, not leaves"
            )

    @abstractmethod
    def worth(self, reward: Tensor, plan: Plan) -> Tensor:
        """Of choices (P, E), by the rewards of leaves (P, L); NaN: none."""

    def __call__(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], plan: Plan
    ) -> Tensor:
        """Advantages (P, E) float64 of rewards (P, L) by name, as those of `Credit`."""
        leaves = _groups(plan, len(scores[next(iter(weights))]))
        compared, there = self._compared(scores, weights)
        depth = torch.tensor([plan.nodes[i].depth for i in plan.trained])
        group = torch.arange(len(leaves))[:, None] * (1 + int(depth.max())) + depth
        choice = torch.zeros(group.shape, dtype=torch.float64)
        for weight, reward in compared:
            _check(reward, leaves.flatten()[there])
            leaf = reward.new_full(leaves.shape, torch.nan)
            worth = self.worth(leaf.masked_scatter(there.view(leaf.shape), reward), plan)
            known = ~worth.isnan()
            advantage = _normalised(worth[known], group[known], self)[0]
            choice = choice + weight * worth.masked_scatter(known, advantage)
        return choice.clamp(-self.limit, self.limit) * self.scale


@dataclass(frozen=True, kw_only=True)
class DepthCredit(ByDepth):
    """A choice is worth the mean reward of the leaves that it leads to."""

    def worth(self, reward: Tensor, plan: Plan) -> Tensor:
        below = plan.below().to(reward).T
        # Above the least of a prompt: equal rewards have exactly equal means.
        least = reward.nan_to_num(torch.inf).amin(1, keepdim=True)
        above = (reward - least).nan_to_num(0.0) @ below
        leads = (~reward.isnan()).to(reward) @ below
        return torch.where(leads > 0, least + above / leads, torch.nan)


@dataclass(frozen=True, kw_only=True)
class GainCredit(ByDepth):
    """A choice is worth what it adds: the reward of the leaf that deterministic steps lead to from
    the state after it, less that of the one from the state before."""

    def worth(self, reward: Tensor, plan: Plan) -> Tensor:
        leaf = {}
        for node, position in plan.leaves.items():
            while plan.nodes[node].member is None:
                node = plan.nodes[node].parent
            if node in leaf:
                raise ValueError(f"plan: node {node} has two leaves without a draw; expected one")
            leaf[node] = position
        edges = [(plan.nodes[i].parent, i) for i in plan.trained]
        if missing := {node for edge in edges for node in edge} - {*leaf}:
            raise ValueError(f"plan: nodes {sorted(missing)[:5]} have no leaf without a draw")
        before, after = zip(*((leaf[a], leaf[b]) for a, b in edges), strict=True)
        return reward[:, after] - reward[:, before]
