"""What the Triton kernels of all ops share: chunks of samples, the mean of a step, sums in a fixed
order, launches. What the losses share on top of it is in loss_triton.

What kernels take:
a latent: (pointer, elements from sample to sample), each sample contiguous; None where absent
edge:     a sample's nine coefficients, in the order of schedules.COLUMNS
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern import torch_private as private

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
def step_mean(edge, x, v):
    return tl.load(edge) * x + tl.load(edge + 1) * v


# Constants of kernels are functions where they can be: a global one is compared at every launch.
@triton.constexpr_function
def sums_of(block):
    """How many partial sums a tile makes: one for 1,024 elements, or for a smaller tile."""
    return max(1, block // 1024)


@triton.jit
def partial_sums(x):
    """(sums_of(BLOCK),): sums of neighbors, by pairs. So they have the same bits whatever layout a
    kernel's compiler gives x, and whatever tile the kernel takes: a draw and its replay may differ.
    """
    SUMS: tl.constexpr = sums_of(x.shape[0])
    for _ in tl.static_range(20):
        if x.shape[0] > SUMS:
            x = tl.sum(x.reshape(x.shape[0] // 2, 2), axis=1)
    return x


@triton.jit
def tree_sum(x):
    """The sum of up to 1,024 values, by neighboring pairs."""
    return tl.sum(partial_sums(x), axis=0)


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
    if not x.is_contiguous() or x.is_neg():
        x = per_sample_contiguous(x)
    return x, x.stride(0)


def packed_edges(edges: Tensor) -> tuple[Tensor, int]:
    """Edges and their stride: 0 where one serves all samples."""
    edges = edges.contiguous()
    return edges, 0 if edges.ndim == 1 else edges.stride(0)


_INTERPRETED = interpreting()  # settled when triton is imported
LONG = 2**18  # elements of a sample from which on tiles grow


class Cut(NamedTuple):
    """How a launch cuts samples into chunks."""

    size: int
    chunks: int  # one where there are no elements
    block: int
    warps: int

    @property
    def sums(self) -> int:
        """Partial sums of a sample."""
        return self.chunks * sums_of(self.block)


def tile(grown: bool) -> tuple[int, int]:
    """(elements, warps) of a program. The sums do not depend on it.

    Eight elements per thread are one 128-bit load of 16 bits, two of float32. A program that ends
    with an arrival waits for it with nothing on its way. So where samples are long enough for many
    programs, each reads more before it does.
    """
    if _INTERPRETED:
        return 2**16, 1  # any length costs the same
    return (2048, 4) if grown else (1024, 4)


def cut(x: Tensor, may_grow: bool = False) -> Cut:
    """For samples as those of `x`. may_grow: programs end with an arrival or draw noise, and have
    registers left.
    """
    batch = x.shape[0]
    size = x.numel() // batch if batch else 0
    block, warps = tile(may_grow and size > LONG)
    return Cut(size, -(-size // block) or 1, block, warps)


def launch(kernel, latent: Tensor, cut: Cut, *arguments, programs: int | None = None, **constants):
    """One program for each chunk of each sample of `latent`, or `programs` of them."""
    constants |= {"BLOCK": cut.block, "num_warps": cut.warps}
    programs = programs or latent.shape[0] * cut.chunks
    launch_programs(kernel, latent, programs, *arguments, cut.size, **constants)


def launch_programs(kernel, latent: Tensor, programs: int, *arguments, **constants):
    """So many programs, on the device of `latent`."""
    if latent.is_cuda and latent.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(latent):
            kernel[(programs,)](*arguments, enable_fp_fusion=False, **constants)
    else:
        kernel[(programs,)](*arguments, enable_fp_fusion=False, **constants)


_KEPT_SUMS, _KEPT_COUNTERS = 2**16, 2**14


def scratch(x: Tensor, sums: int, counters: int) -> tuple[Tensor, Tensor]:
    """At least (sums,) float64, and (counters,) int32 that are 0; kernels leave the counters 0, so
    that nothing clears them first.

    One set per stream, on which kernels do not overlap; a graph has its own, and clears it.
    """
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return _allocate(x.device, sums, counters)
    stream = private.raw_stream(x.get_device())
    capacity = _KEPT_COUNTERS if counters <= _KEPT_COUNTERS else 1 << (counters - 1).bit_length()
    kept_sums, kept_counters = _kept(x.device, stream, capacity)
    if sums > _KEPT_SUMS:
        kept_sums = torch.empty(sums, dtype=torch.float64, device=x.device)
    return kept_sums, kept_counters


def _allocate(device: torch.device, sums: int, counters: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(sums, dtype=torch.float64, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )


@functools.cache
def _kept(device: torch.device, stream: int, counters: int) -> tuple[Tensor, Tensor]:
    """Allocated on a thread of its own: when torch.compile warms up a CUDA graph, whatever this
    thread allocates comes from a pool in which nothing may outlive the graph.
    """
    here = torch.cuda.current_stream(device)  # by address 0 torch would give us one of its pool

    def allocate() -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(here):
            return _allocate(device, _KEPT_SUMS, counters)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()
