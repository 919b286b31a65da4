"""What rewards get, checked and as bytes: the one place that knows layouts and ranges of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_bytes", "check_layout", "check_range"]

SLACK = 1e-3
"""How far out of [0, 1] a pixel may be: less than a third of a level."""


def check_layout(images: Tensor, prompts: Sequence[str] | None = None) -> None:
    """Raise ValueError for what is neither images (B, 3, H, W) nor videos (B, F, 3, H, W), or has
    another number of prompts. Other layouts are not guessed at: three frames look like RGB.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images: got {type(images).__name__}, expected a tensor of torch")
    shape = tuple(images.shape)
    if images.ndim not in (4, 5) or shape[-3] != 3 or 0 in shape:
        raise ValueError(f"images: got shape {shape}, expected (B, 3, H, W) or (B, F, 3, H, W)")
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"prompts: got {len(prompts)}, expected {len(images)} as images")


def as_bytes(images: Tensor) -> Tensor:
    """Images or videos in [0, 1] -> uint8 of the same shape, to the nearest level: what a file of
    them would hold. uint8 is taken as it is.

    Raises ValueError for another layout or dtype, and for values more than 1e-3 out of [0, 1]
    (images in [-1, 1] or [0, 255] are not rescaled), or none.
    """
    check_layout(images)
    if images.dtype == torch.uint8:
        return images
    check_range(images)
    return images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def check_range(images: Tensor) -> None:
    """Raise ValueError, as `as_bytes`, for what is no floating point in [0, 1]."""
    if not images.is_floating_point():
        raise ValueError(f"images: got {images.dtype}, expected floating point in [0, 1], or uint8")
    low, high = torch.stack(images.aminmax()).tolist()  # a NaN is both
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise ValueError(f"images: got values from {low:g} to {high:g}, expected [0, 1]")
