"""What each token weighs in a loss: every normalizer of the field, as one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common.arguments import INTEGERS, is_number

AGGREGATIONS = ("turn_mean", "seq_mean", "token_mean", "constant")


def token_weights(
    row: Tensor, trajectory: Tensor, agg: str = "turn_mean", total: float | None = None
) -> Tensor:
    """(M,) float32 weights, of which a loss takes the weighted sum.

    Args:
        row, trajectory: (M,) integers: the turn and the rollout of each token. A turn is of one
            rollout; ids need not be dense, nor in order.
        agg: with N trajectories, T turns of a trajectory, L tokens of a turn:
            "turn_mean" 1 / (N T L), AgentFlow's (arXiv 2510.05592, equation 5);
            "seq_mean" 1 / (N tokens of the trajectory); "token_mean" 1 / M;
            "constant" 1 / total, as Dr. GRPO's (arXiv 2503.20783).
        total: the N or M of all processes and accumulated batches, where these tokens are a share
            of them; None: those counted here.

    Raises ValueError, TypeError naming the argument.
    """
    for name, index in (("row", row), ("trajectory", trajectory)):
        if not isinstance(index, Tensor) or index.dtype not in INTEGERS or index.ndim != 1:
            raise TypeError(f"{name}: expected an integer tensor of shape (M,)")
    if row.shape != trajectory.shape or row.device != trajectory.device:
        raise ValueError(
            f"trajectory: expected shape {tuple(row.shape)} on {row.device}, "
            f"got {tuple(trajectory.shape)} on {trajectory.device}"
        )
    if agg not in AGGREGATIONS:
        raise ValueError(f"agg: expected one of {AGGREGATIONS}, got {agg!r}")
    if total is None and agg == "constant":
        raise ValueError("total: needed for agg='constant', got None")
    if total is not None and not (is_number(total) and total > 0):
        raise ValueError(f"total: expected a number > 0, got {total!r}")
    count = len(row)
    if agg in ("token_mean", "constant"):
        each = 1 / (total or max(1, count))
        return torch.full((count,), each, dtype=torch.float32, device=row.device)
    _, of_token, tokens = trajectory.unique(return_inverse=True, return_counts=True)
    per_token = tokens[of_token]
    if agg == "turn_mean":
        _, turn, length = row.unique(return_inverse=True, return_counts=True)
        of_turn = of_token.new_empty(len(length)).index_copy_(0, turn, of_token)
        if not torch.equal(of_turn[turn], of_token):
            raise ValueError("row: expected every turn within one trajectory")
        turns = torch.bincount(of_turn, minlength=len(tokens))
        per_token = turns[of_token] * length[turn]
    return (1 / ((total or len(tokens)) * per_token.double())).float()
