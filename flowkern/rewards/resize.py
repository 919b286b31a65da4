"""Pillow's resampling of RGB bytes, to the bit, on any device; centre crops and normalisation.

Scores of published models belong to images as Pillow scaled them, and every other antialiasing
differs by some levels. Pillow works in integers: each axis has its taps, weights in 2^-22, and the
result of an axis is rounded to a byte before the next; so torch gives the same in int32. Which axis
comes first is for the installed Pillow to say: it has changed. Tensors on the CPU go through Pillow
itself, which is faster there (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "METHODS",
    "centre_crop",
    "normalise",
    "resize",
    "resize_by_taps",
    "short_edge",
]

BITS = 22
HEIGHT_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
"""Where it loses more than twice the pixels that the width does (python-pillow/Pillow #9549); up to
12 the width is first always, which a tall image shows by a level here and there."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP's images are normalised by, and those of many networks since."""
METHODS = {"bilinear": 1.0, "bicubic": 2.0}
"""Name -> support of the filter, in pixels of the coarser of the two images."""


def short_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """(height, width) at which the shorter is `edge`, the other cut to a whole pixel: the rule of
    transformers and torchvision.
    """
    if height <= width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge


def resize(images: Tensor, size: tuple[int, int], method: str = "bicubic") -> Tensor:
    """uint8 (..., 3, H, W) -> uint8 (..., 3, *size), what ``PIL.Image.resize`` makes of each.

    size: (height, width). method: a key of METHODS. Raises ValueError for another dtype or method.
    """
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected uint8, RGB")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if min(size) < 1:
        raise ValueError(f"size: got {size}, expected at least one pixel each way")
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return (_by_pillow if images.device.type == "cpu" else resize_by_taps)(images, size, method)


def resize_by_taps(images: Tensor, size: tuple[int, int], method: str = "bicubic") -> Tensor:
    """`resize` in torch, on any device. Takes 9 bytes for each value that the larger pass gives."""
    height, width = (old - new for old, new in zip(images.shape[-2:], size, strict=True))
    for axis in (-2, -1) if HEIGHT_MAY_BE_FIRST and height > max(0, 2 * width) else (-1, -2):
        images = _along(images, axis, size[axis], method)
    return images


def _along(images: Tensor, axis: int, length: int, method: str) -> Tensor:
    """One pass, along an axis of any size."""
    if images.shape[axis] == length:
        return images
    places, weights = (part.to(images.device) for part in _taps(images.shape[axis], length, method))
    shape = (-1, 1) if axis == -2 else (-1,)
    total: Tensor | None = None
    for place, weight in zip(places, weights.view(len(weights), *shape), strict=True):
        term = images.index_select(axis, place).to(torch.int32).mul_(weight)
        total = term.add_(1 << (BITS - 1)) if total is None else total.add_(term)
    assert total is not None
    return total.bitwise_right_shift_(BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps(length: int, wanted: int, method: str) -> tuple[Tensor, Tensor]:
    """Places (taps, wanted) int64 and weights (taps, wanted) int32 in 2^-22 of each new pixel.

    Pillow's precompute_coeffs and normalize_coeffs_8bpc, in its order of operations.
    """
    scale = length / wanted
    wide = max(scale, 1.0)
    support = METHODS[method] * wide
    centre = (np.arange(wanted) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), length)
    places = first + np.arange((last - first).max())[:, None]
    weights = _kernel((places - centre + 0.5) * (1.0 / wide), method)
    weights[places >= last] = 0.0
    weights /= np.cumsum(weights, axis=0)[-1]  # a sum in order, as Pillow's
    whole = np.trunc(weights * (1 << BITS) + np.copysign(0.5, weights))
    places = np.minimum(places, length - 1)
    return torch.from_numpy(places), torch.from_numpy(whole.astype(np.int32))


def _kernel(x: np.ndarray, method: str) -> np.ndarray:
    x = np.abs(x)
    if method == "bilinear":
        return np.where(x < 1, 1 - x, 0.0)
    a = -0.5  # Keys'; torch's bicubic without antialias has -.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _by_pillow(images: Tensor, size: tuple[int, int], method: str) -> Tensor:
    kind = Image.Resampling[method.upper()]
    rows = images.flatten(0, -4) if images.ndim > 3 else images[None]
    new = torch.empty((len(rows), *size, 3), dtype=torch.uint8)
    for row, out in zip(rows.permute(0, 2, 3, 1).contiguous().numpy(), new.numpy(), strict=True):
        out[:] = np.asarray(Image.fromarray(row).resize((size[1], size[0]), kind))
    return new.permute(0, 3, 1, 2).reshape(*images.shape[:-2], *size)


def centre_crop(images: Tensor, size: tuple[int, int], rule: str = "transformers") -> Tensor:
    """The middle (..., *size) of (..., H, W). Where what is left over is odd the rules differ:
    "transformers" begins at the lower half, "torchvision" (open_clip, ImageReward) at Python's
    round of it, which is the even one. Raises ValueError for an image that is smaller.
    """
    over = [have - want for have, want in zip(images.shape[-2:], size, strict=True)]
    if min(over) < 0:
        raise ValueError(f"size: got {size}, expected at most the {tuple(images.shape[-2:])} there")
    if rule not in ("transformers", "torchvision"):
        raise ValueError(f"rule: got {rule!r}, expected 'transformers' or 'torchvision'")
    top, left = (n // 2 if rule == "transformers" else round(n / 2) for n in over)
    return images[..., top : top + size[0], left : left + size[1]]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., 3, H, W) -> float32 (value / 255 - mean) / std, in this order, by channel."""
    shift, scale = (
        images.new_tensor(one, dtype=torch.float32).view(3, 1, 1) for one in (mean, std)
    )
    return images.to(torch.float32).div_(255).sub_(shift).div_(scale)
