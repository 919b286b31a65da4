"""What the torch references of all ops share: coefficients that broadcast, guidance, the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.schedules import COLUMNS


def column(edges: Tensor, name: str, like: Tensor) -> Tensor:
    """A coefficient, shaped to broadcast over `like` (B, *D)."""
    return edges[..., COLUMNS.index(name)].reshape(-1, *[1] * (like.ndim - 1))


def guided(
    velocity: Tensor, velocity_uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype
) -> Tensor:
    velocity = velocity.to(dtype)
    if velocity_uncond is None:
        return velocity
    uncond = velocity_uncond.to(dtype)
    return uncond + guidance_scale * (velocity - uncond)
