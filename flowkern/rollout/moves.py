"""From the host to a device, in as few copies as there can be; none of them is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def moved(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """From the host; converted there, so that the copy waits for nothing on the device."""
    return value.to(dtype or value.dtype).to(device, non_blocking=True)


def together(
    values: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Several, of one dtype or made so, in one copy, of which they are parts."""
    flat = torch.cat([value.to(dtype or value.dtype).flatten() for value in values])
    parts = moved(flat, device).split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


class Index(NamedTuple):
    """Places, known on the host and on a device."""

    on_host: Tensor
    there: Tensor


def indices(values: Sequence[Tensor], device: torch.device) -> list[Index]:
    """Of places on the host, in one copy."""
    return [Index(*pair) for pair in zip(values, together(values, device), strict=True)]


def picked(kept: Tensor, place: Index, prompt: Index, device: torch.device) -> Tensor:
    """(R, *D) of kept (first, second, *D), wherever it lies, at (R,) places each."""
    if kept.device == device:
        return kept[place.there, prompt.there]
    found = kept[place.on_host, prompt.on_host]
    return moved(found.pin_memory() if device.type == "cuda" else found, device)
