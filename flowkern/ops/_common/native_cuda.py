"""What the native CUDA kernels ask of torch for a launch: memory, and samples sorted by their rows.

Called by csrc/cuda_module.cpp, which keeps what it can: at image size a kernel runs for
microseconds, and this is what the host adds.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def scratch(
    index: int, stream: int, floats: int, counts: int, is_captured: bool
) -> tuple[Tensor, Tensor]:
    """float32, uninitialized, and int32 zeros, which kernels leave zero, on a stream of a device.

    What is kept for a stream is allocated on a thread of its own: when torch.compile warms up a
    CUDA graph, whatever this thread allocates comes from a pool in which nothing may outlive the
    graph.
    """

    def allocate() -> tuple[Tensor, Tensor]:
        device = torch.device("cuda", index)
        return (
            torch.empty(floats, dtype=torch.float32, device=device),
            torch.zeros(counts, dtype=torch.int32, device=device),
        )

    if is_captured:  # a graph has its own, and clears it
        return allocate()
    here = torch.cuda.current_stream(index)  # by address 0 torch would give us one of its pool

    def allocate_there() -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(here):
            return allocate()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate_there).result()


def siblings(row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Samples in the order of their rows, ascending within a row (B,), and where each row's begin
    (R + 1,): without a look at the values, and the same for any number of blocks.

    A row out of range counts as the nearest one: every sample is served, if only with a NaN.
    """
    of_sample, order = torch.sort(row.clamp(0, rows - 1), stable=True)
    return order, torch.searchsorted(of_sample, torch.arange(rows + 1, device=row.device))
