"""From the reward of an answer to the advantage of every turn that led to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowkern.rl.advantage import group_advantage


@dataclass(frozen=True)
class TurnCredit:
    """(R - mean of its group) / (std + eps), the same for all turns of a trajectory (arXiv
    2510.05592, equation 7)."""

    group_by: Literal["trajectory", "row"] = "trajectory"
    """What mean and std are taken over: the G trajectories of a question, or, as in the released
    code, all rows of them, so that a trajectory counts as often as it has turns."""
    turns: Literal["all", "final"] = "all"
    """Which turns learn; "final": the last one alone, the others have advantage 0."""
    unbiased: bool = False
    eps: float = 0.0
    min_std: float = 1e-6

    def __call__(self, reward: Tensor, group: Tensor, trajectory: Tensor) -> Tensor:
        """reward, group: (N,) of the trajectories; trajectory: (R,) whose turn each row is, in the
        order of turns. Returns (R,) float64. Raises ValueError for rewards that are not finite."""
        options = {"unbiased": self.unbiased, "eps": self.eps, "min_std": self.min_std}
        if self.group_by == "trajectory":
            advantage = group_advantage(reward, group, **options)[trajectory]
        else:
            advantage = group_advantage(reward[trajectory], group[trajectory], **options)
        if self.turns == "final":
            place = torch.arange(len(trajectory))
            last = torch.zeros(len(reward), dtype=place.dtype)
            last = last.scatter_reduce(0, trajectory, place, "amax")
            advantage = torch.where(last[trajectory] == place, advantage, 0.0)
        return advantage
