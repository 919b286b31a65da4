"""What the torch references of the losses share: samples of rows, means, the clip, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def samples_of(row: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """(R, *D) velocity rows -> (B, *D), in the dtype of the arithmetic."""
    return lambda x: x.to(dtype) if row is None else x.to(dtype)[row]


def wide(scalar: Tensor, like: Tensor) -> Tensor:
    """(B,), or () for all, shaped to broadcast over `like` (B, *D)."""
    return scalar.reshape(-1, *[1] * (like.ndim - 1))


def mean(x: Tensor) -> Tensor:
    """(B, *D) -> (B,); 0 where D is 0."""
    return x.flatten(1).mean(1) if x.numel() else x.flatten(1).sum(1)


def log_clip(clip_low: float, clip_high: float) -> tuple[float, float]:
    """The clip range of the log-ratio; 1 is no lower bound."""
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def clipped_policy(
    advantage: Tensor, log_ratio: Tensor, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A r, -A clip(r, exp(low), exp(high))), what was clipped low, and high."""
    low, high = bounds
    clipped_low = (advantage < 0) & (log_ratio < low)
    clipped_high = (advantage > 0) & (log_ratio > high)
    clamped = log_ratio.detach().clamp(low, high)
    kept = torch.where(clipped_low | clipped_high, clamped, log_ratio)
    return -advantage * (1 + torch.expm1(kept)), clipped_low, clipped_high


def reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return loss.sum() / max(1, len(loss))
    return loss.sum() if reduction == "sum" else loss
