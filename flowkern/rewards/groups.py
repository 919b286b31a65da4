"""How far images are from the others of their groups. B images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["differences", "groups_of"]


def groups_of(group: Sequence[int] | Tensor | None, prompts: Sequence[str]) -> Tensor:
    """(B,): a number per image, the same within a group; None: images of one prompt are one.

    Raises ValueError for another number of them.
    """
    if group is None:
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        group = [place[prompt] for prompt in prompts]
    group = torch.as_tensor(group)
    if group.shape != (len(prompts),):
        raise ValueError(f"group: got {tuple(group.shape)}, expected {len(prompts)} as images")
    return group


def differences(features: Tensor, group: Tensor, distance_to: str = "mean") -> Tensor:
    """Unit features (B, D), groups (B,) -> (B,) cosine distance to the group's others, the "mean"
    over them, or that to the "nearest" one; NaN for one alone. The mean of the former is the mean
    over pairs.
    """
    if distance_to == "nearest":
        is_other = (group[:, None] == group).fill_diagonal_(False)
        near = (features @ features.T).masked_fill(~is_other, -torch.inf).amax(1)
        return 1 - near.masked_fill(near.isneginf(), torch.nan)
    kinds, place, sizes = group.unique(return_inverse=True, return_counts=True)
    total = features.new_zeros(len(kinds), features.shape[1]).index_add_(0, place, features)
    others = total[place] - features
    return 1 - (features * others).sum(-1) / (sizes[place] - 1)
