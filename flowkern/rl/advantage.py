"""Credit: rewards of groups become advantages. B samples; plain torch, in float64.

A = clamp((r - mean of its group) / (std + eps), -limit, limit)
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(
    reward: Tensor,
    group: Tensor,
    *,
    global_std: bool = False,
    unbiased: bool = False,
    eps: float = 1e-4,
    limit: float | None = 5.0,
) -> Tensor:
    """Advantages (B,) float32 of rewards (B,) within groups; group: (B,) integer keys in any order.

    global_std: divide by the standard deviation of all rewards instead of the group's own.
    unbiased: divide the squares by n - 1 instead of n; a group of one has std 0 either way.
    Advantages of a group sum to 0 where the limit cuts none. Meant for the host: a few numbers per
    rollout, whose values are looked at.
    Raises ValueError for rewards that are not finite: a mean would spread them over the group.
    """
    _check(reward, group)
    value = reward.double()
    mean, std, index = _statistics(value, group, unbiased)
    if global_std:
        spread = _statistics(value, torch.zeros_like(group), unbiased)[1]
    else:
        spread = std[index]
    advantage = (value - mean[index]) / (spread + eps)
    if limit is not None:
        advantage = advantage.clamp(-limit, limit)
    return advantage.float()


def zero_std_ratio(reward: Tensor, group: Tensor) -> Tensor:
    """The share of groups whose rewards are all equal, (): they teach nothing."""
    _check(reward, group)
    return (_statistics(reward.double(), group, False)[1] == 0).double().mean()


def _statistics(value: Tensor, group: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (G,) and standard deviation (G,) per group, and each sample's group (B,)."""
    keys, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    total = value.new_zeros(len(keys))
    # Shifted by one value of the group, so that equal rewards give a std of exactly 0.
    origin = total.index_put((index,), value)
    shifted = value - origin[index]
    mean = total.index_add(0, index, shifted) / count
    square = total.index_add(0, index, (shifted - mean[index]).square())
    std = (square / (count - int(unbiased)).clamp(min=1)).sqrt()
    return origin + mean, std, index


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
