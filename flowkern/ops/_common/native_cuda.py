"""What a launch of a native CUDA kernel needs besides its arguments: a queue, and scratch memory.

Kept small: at image size a kernel runs for microseconds, and this is what the host adds.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import native
from .arguments import Noise


def queue(x: Tensor) -> tuple[int, int]:
    """(device, stream): the current stream of the device of `x`."""
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


def key(source: Noise | None, stream: int) -> tuple[int, int, int, int, int]:
    """A Philox key as kernels take it; without ids it makes no noise."""
    if source is None:
        return 0, 0, 0, 0, stream
    return (
        source.seed & (2**64 - 1), native.address(source.sample_id), native.address(source.step),
        source.step_value, stream,
    )  # fmt: skip


NO_SCRATCH = (0, 0)


def scratch(x: Tensor, samples: int, size: int, sums: int = 1) -> tuple[int, int, object]:
    """Memory for `sums` sums over each sample of `size` elements: two addresses, and its owner.

    The first is for the sums of tiles and the losses of samples; the second counts arrivals: zeros,
    which kernels leave zero.
    """
    floats = samples * (native.cuda().tiles_of(size) * sums + 1)
    partial, arrivals = owner = _memory(x, floats, samples + 1)
    return partial.data_ptr(), arrivals.data_ptr(), owner


def _memory(x: Tensor, floats: int, counts: int) -> tuple[Tensor, Tensor]:
    if torch.cuda.is_current_stream_capturing():  # a graph has its own, and clears it
        return _allocate(x.device, floats, counts)
    return _kept(*queue(x), _capacity(floats, 2**18), _capacity(counts, 2**14))


def _capacity(needed: int, least: int) -> int:
    return max(least, 1 << (needed - 1).bit_length())


def _allocate(device: torch.device, floats: int, counts: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(floats, dtype=torch.float32, device=device),
        torch.zeros(counts, dtype=torch.int32, device=device),
    )


@functools.cache
def _kept(index: int, stream: int, floats: int, counts: int) -> tuple[Tensor, Tensor]:
    """One set per stream, on which kernels do not overlap.

    Allocated on a thread of its own: when torch.compile warms up a CUDA graph, whatever this thread
    allocates comes from a pool in which nothing may outlive the graph.
    """

    here = torch.cuda.current_stream(index)  # by address 0 torch would give us one of its pool

    def allocate() -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(here):
            return _allocate(torch.device("cuda", index), floats, counts)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()
