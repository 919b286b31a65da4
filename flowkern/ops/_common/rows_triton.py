"""What the Triton kernels of all ops share: chunks of samples, the mean of a step, sums in a fixed
order, launches. What the losses share on top of it is in loss_triton.

What kernels take:
a latent: (pointer, elements from sample to sample), each sample contiguous; None where absent
row:      a sample's nine coefficients, in the order of schedules.COLUMNS
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import per_sample_contiguous
from .dispatch import interpreting


@triton.jit
def load(latent, sample, first, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    pointer = latent[0] + sample * latent[1] + first
    return tl.load(pointer + lane, mask=lane < count, other=0.0).to(tl.float32)


@triton.jit
def store(latent, sample, first, count, value, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    pointer = latent[0] + sample * latent[1] + first
    tl.store(pointer + lane, value.to(latent[0].dtype.element_ty), mask=lane < count)


@triton.jit
def guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK: tl.constexpr):
    v = load(velocity, sample, first, count, BLOCK)
    if uncond is not None:
        u = load(uncond, sample, first, count, BLOCK)
        v = u + guidance_scale * (v - u)
    return v


@triton.jit
def step_mean(row, x, v):
    return tl.load(row) * x + tl.load(row + 1) * v


@triton.jit
def tree_sum(x):
    """The sum by neighboring pairs: the same bits whatever layout a kernel's compiler gives x."""
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            x = tl.sum(x.reshape(x.shape[0] // 2, 2), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def ordered_total(sums_ptr, count):
    """The sum of `count` floats in float64 and in a fixed order."""
    lane = tl.arange(0, 1024)
    total = tl.zeros((1024,), tl.float64)
    begin = 0
    while begin < count:
        sums = tl.load(sums_ptr + begin + lane, mask=lane < count - begin, other=0.0)
        total += sums.to(tl.float64)
        begin += 1024
    return tree_sum(total)


def packed_latent(x: Tensor | None) -> tuple[Tensor, int] | None:
    if x is None:
        return None
    x = per_sample_contiguous(x)
    return x, x.stride(0)


def packed_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows and their stride: 0 where one edge serves all samples."""
    rows = rows.contiguous()
    return rows, 0 if rows.ndim == 1 else rows.stride(0)


def tile() -> tuple[int, int]:
    """(elements, warps) of a program: one tile for all, since it orders the sums.

    Eight elements per thread are one 128-bit load of bf16, two of float32. (2048, 8) makes ptxas
    spill in some of the losses.
    """
    return (2**16, 1) if interpreting() else (1024, 4)  # interpreted, any length costs the same


def chunks_of(latent: Tensor) -> int:
    """Chunks of a sample of `latent`; one where it has no elements."""
    size = math.prod(latent.shape[1:])
    return max(1, triton.cdiv(size, tile()[0]))


def launch(kernel, latent: Tensor, *arguments, programs: int | None = None, **constants) -> None:
    """One program for each chunk of each sample of `latent`, or `programs` of them."""
    size = math.prod(latent.shape[1:])
    block, warps = tile()
    with torch.cuda.device_of(latent):
        kernel[(programs or latent.shape[0] * chunks_of(latent),)](
            *arguments, size, BLOCK=block, num_warps=warps, enable_fp_fusion=False, **constants
        )


def arrivals_of(batch: int, device: torch.device) -> Tensor:
    """At least (batch,) int32 zeros; kernels leave them zero, so that nothing clears them first."""
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(batch, dtype=torch.int32, device=device)  # a graph clears its own
    capacity = max(2**14, triton.next_power_of_2(batch))
    return _kept_zeros(torch.cuda.current_stream(device), capacity)


@functools.cache
def _kept_zeros(stream: torch.cuda.Stream, capacity: int) -> Tensor:
    """One set per stream, on which kernels do not overlap.

    Allocated on a thread of its own: when torch.compile warms up a CUDA graph, whatever this thread
    allocates comes from a pool in which nothing may outlive the graph.
    """

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(capacity, dtype=torch.int32, device=stream.device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()
