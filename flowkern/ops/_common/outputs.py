"""The small outputs of a loss in one allocation: on a GPU ten of them cost more than the kernel."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

_now = threading.local()
_cut = torch.unsafe_split_with_sizes  # what it gives are no views: each has a version of its own


def loss_outputs(
    batch: int, statistics: int, slopes: int, reduction: str, device: torch.device
) -> tuple[Tensor, ...]:
    """loss, (B,) with reduction="none", else (); the statistics (B,); clipped_low, clipped_high
    (B,) of bool; slopes (B, n).

    Addresses are multiples of 16 bytes. Uninitialized, but for the loss of no samples, which is 0.
    """
    if getattr(_now, "apart", False):
        return _apart(batch, statistics, slopes, reduction, device)
    of_loss = batch if reduction == "none" else 1
    sizes, flags, kept, size = _layout(batch, statistics, slopes, of_loss)
    memory = (torch.empty if batch else torch.zeros)(size, dtype=torch.float32, device=device)
    pieces = _cut(memory, sizes)
    *floats, loss, slopes_of = [pieces[index] for index in kept]
    low, high = _cut(pieces[-1].view(torch.bool), flags)[:: len(flags) // 2]
    if reduction != "none":
        loss.resize_(())
    return loss, *floats, low, high, slopes_of.resize_(batch, slopes)


def apart(forward: Callable) -> Callable:
    """`forward` with outputs each in memory of its own: those of an op must not share any."""

    @functools.wraps(forward)
    def call(*arguments):
        _now.apart = True
        try:
            return forward(*arguments)
        finally:
            _now.apart = False

    return call


def _apart(batch, statistics, slopes, reduction, device) -> tuple[Tensor, ...]:
    shape = (batch,) if reduction == "none" else ()
    floating = {"dtype": torch.float32, "device": device}
    loss = (torch.empty if batch else torch.zeros)(shape, **floating)
    floats = [torch.empty(batch, **floating) for _ in range(statistics)]
    flags = [torch.empty(batch, dtype=torch.bool, device=device) for _ in range(2)]
    return loss, *floats, *flags, torch.empty(batch, slopes, **floating)


@functools.lru_cache(64)
def _layout(
    batch: int, statistics: int, slopes: int, of_loss: int
) -> tuple[list[int], list[int], list[int], int]:
    """Sizes in floats, the bools last, in bytes; which pieces are no padding; the sum."""
    sizes, kept = [], []
    for length in (*[batch] * statistics, of_loss, batch * slopes):
        kept.append(len(sizes))
        sizes += [length, -length % 4] if length % 4 else [length]
    up = batch + -batch % 16
    flags = [batch, up - batch, batch, up - batch] if up != batch else [batch, batch]
    sizes.append(up // 2)
    return sizes, flags, kept, sum(sizes)
