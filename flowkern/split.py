"""Tensors of which each of several processes holds a part: whole again, or parted as others are.

They are torch's DTensors; to import those takes seconds, which one process need not wait for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["gathered", "is_split", "part_of", "swap", "whole"]


def is_split(tensor: Any) -> bool:
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """With every process's part, to be asked for on all of them; as it is where it is not split."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def gathered(tree: Any, is_kept: bool = True) -> Any:
    """Mappings and lists with their split tensors whole and on the host, one after another.

    Every process is to ask; where it is not kept, None stands for those.
    """
    if isinstance(tree, Mapping):
        return {key: gathered(value, is_kept) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, is_kept) for value in tree)
    if not is_split(tree):
        return tree
    full = tree.detach().full_tensor()
    return full.cpu() if is_kept else None


def own_part(tensor: Tensor) -> Tensor:
    """This process's; all of it where it is not split."""
    return tensor.to_local() if is_split(tensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, which every process has, split as `like` is; as it is where that is not."""
    if not is_split(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    # A part of its own: a view would keep the whole.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()


@torch.no_grad()
def swap(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors that are split alike, or not at all.

    To exchange the `data` of split ones changes nothing of what a network computes with: their
    parts are exchanged in place, and what was gathered of them before is then stale.
    """
    if not is_split(one):
        one.data, other.data = other.data, one.data
        return
    mine, others = one.to_local(), other.to_local()
    before = mine.clone()
    mine.copy_(others)
    others.copy_(before)
