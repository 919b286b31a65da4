"""What the loss kernels share: the samples of a velocity row, their sums and statistics, the clip.

A program takes one chunk of one velocity row and serves every sample of that row, so that siblings
read their velocity once. The last program of a sample adds its chunks, the last program of all
makes the statistics of all samples, each in a fixed order: a sample's depend on it alone.

place:   rows, batch, chunk, chunks, size
scratch: (floats, arrivals): the means (sums, B) of the samples and what they are made of, the sums
         of the chunks (B, sums, chunks), in float64; B + 1 counters that are 0 before and after
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows_triton import arrivals_of, ordered_total, tree_sum


@triton.jit
def row_place(batch, chunks, size):
    """The velocity row, and its place, in a grid of rows x chunks, flat."""
    program = tl.program_id(0)
    rows, chunk = tl.num_programs(0) // chunks, (program % chunks).to(tl.int64)
    return (program // chunks).to(tl.int64), (rows, batch, chunk, chunks, size)


@triton.jit
def next_sample(row_ptr, slopes_ptr, SLOPES: tl.constexpr, row, after, place):
    """The first sample of `row` past `after`; with slopes (B, SLOPES), the first that has one.

    `batch` where there is none. A row out of range, which nothing looks for on a GPU, counts as the
    nearest one: every sample is served, and `advantage_of` makes its loss NaN.
    """
    rows, batch = place[0], place[1]
    found = batch.to(tl.int64)
    if row_ptr is None:
        if _has_slope(slopes_ptr, SLOPES, row, True):
            found = row
    else:
        first = batch
        begin = tl.full((), after + 1, tl.int32)
        while (begin < batch) & (first == batch):
            sample = begin + tl.arange(0, 32)
            here = sample < batch
            its_row = tl.load(row_ptr + sample, mask=here, other=0)
            here &= tl.minimum(tl.maximum(its_row, 0), rows - 1) == row
            if slopes_ptr is not None:
                here &= _has_slope(slopes_ptr, SLOPES, sample, here)
            first = tl.min(tl.where(here, sample, batch), axis=0)
            begin += 32
        found = first.to(tl.int64)
    return found


@triton.jit
def _has_slope(slopes_ptr, SLOPES: tl.constexpr, sample, mask):
    has_slope = sample < 0
    for j in tl.static_range(SLOPES):
        slope = tl.load(slopes_ptr + sample * SLOPES + j, mask=mask, other=0.0)
        has_slope |= ~is_silent(slope)
    return has_slope


@triton.jit
def is_silent(slope):
    """+0: what it multiplies is not read; -0 is multiplied, so that NaN passes (policy_loss.h)."""
    return slope.to(tl.int32, bitcast=True) == 0


@triton.jit
def chunk_sum(x, count, BLOCK: tl.constexpr):
    return tree_sum(tl.where(tl.arange(0, BLOCK) < count, x, 0.0))


@triton.jit
def put_down(scratch, sums, sample, place):
    """Stores the sums of a chunk of a sample."""
    _, batch, chunk, chunks, _ = place
    for j in tl.static_range(len(sums)):
        tl.store(scratch[0] + (batch + sample * chunks) * len(sums) + j * chunks + chunk, sums[j])


@triton.jit
def arrive(scratch, SUMS: tl.constexpr, sample, place):
    """Counts a chunk of a sample; whether it was the last one, of the last sample."""
    floats_ptr, arrivals_ptr = scratch
    _, batch, _, chunks, size = place
    is_last = sample < 0
    if tl.atomic_add(arrivals_ptr + sample, 1, sem="acq_rel") == chunks - 1:
        for j in tl.static_range(SUMS):
            total = ordered_total(
                floats_ptr + (batch + sample * chunks) * SUMS + j * chunks, chunks
            )
            tl.store(floats_ptr + j * batch + sample, total / tl.maximum(size, 1))
        tl.store(arrivals_ptr + sample, 0)
        is_last = tl.atomic_add(arrivals_ptr + batch, 1, sem="acq_rel") == batch - 1
    return is_last


@triton.jit
def arrive_all(scratch, SUMS: tl.constexpr, row_ptr, row, place):
    """As `arrive`, for all samples of a row: apart from their sums, which need the registers."""
    is_last = row < 0
    sample = next_sample(row_ptr, None, 0, row, -1, place)
    while sample < place[1]:
        is_last |= arrive(scratch, SUMS, sample, place)
        sample = next_sample(row_ptr, None, 0, row, sample, place)
    return is_last


@triton.jit
def samples_from(begin, place):
    """The next samples, as a vector: past the batch its last one again and again."""
    return tl.minimum(begin + tl.arange(0, 128), place[1] - 1).to(tl.int64)


@triton.jit
def mean_of(scratch, j, sample, place):
    """The mean over each sample of the j-th of its sums, in float64."""
    return tl.load(scratch[0] + j * place[1] + sample)


@triton.jit
def share_of(place, REDUCTION: tl.constexpr):
    """What one element weighs in the loss: 1 / D, for the mean over samples 1 / (B D)."""
    share = tl.full((), 1.0, tl.float64) / tl.maximum(place[4], 1)
    return share / place[1] if REDUCTION == "mean" else share


@triton.jit
def advantage_of(advantage_ptr, row_ptr, sample, place):
    advantage = tl.load(advantage_ptr + sample)
    if row_ptr is not None:
        row = tl.load(row_ptr + sample)
        advantage = tl.where((row >= 0) & (row < place[0]), advantage, float("nan"))
    return advantage


@triton.jit
def clipped_policy(advantage, log_ratio, bounds):
    """max(-A r, -A clip(r, exp(low), exp(high))), its slope in log_ratio, what was clipped.

    In float64, where exp keeps the digits for which float32 needs expm1.
    """
    low, high = bounds
    clipped_low = (advantage < 0) & (log_ratio < low)
    clipped_high = (advantage > 0) & (log_ratio > high)
    clipped = tl.where(clipped_low, low, tl.where(clipped_high, high, log_ratio))
    loss = -advantage * tl.exp(clipped.to(tl.float64))
    slope = tl.where(clipped_low | clipped_high, 0.0, loss)
    return loss, slope, clipped_low, clipped_high


@triton.jit
def reduced(total, loss, begin, place):
    """`total` (128,) and the losses of the samples from `begin` on."""
    return total + tl.where(tl.arange(0, 128) < place[1] - begin, loss, 0.0)


@triton.jit
def finish(loss_ptr, scratch, total, place, REDUCTION: tl.constexpr):
    """Stores the loss of the batch, where it is one, and clears the last counter."""
    batch = place[1]
    if REDUCTION != "none":
        loss = tree_sum(total)
        tl.store(loss_ptr, loss / batch if REDUCTION == "mean" else loss)
    tl.store(scratch[1] + batch, 0)


def packed_row(row: Tensor | None) -> Tensor | None:
    return None if row is None else row.contiguous()


def log_clip(clip_low: float, clip_high: float) -> tuple[float, float]:
    """The clip range of the log-ratio; 1 is no lower bound."""
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def loss_outputs(
    batch: int, statistics: int, slopes: int, reduction: str, device: torch.device
) -> tuple[Tensor, ...]:
    """loss, the statistics, clipped_low, clipped_high, slopes; a loss of nothing is 0."""
    loss_shape = (batch,) if reduction == "none" else ()
    loss = (torch.empty if batch else torch.zeros)(loss_shape, device=device)
    floats = [torch.empty(batch, device=device) for _ in range(statistics)]
    bools = [torch.empty(batch, dtype=torch.bool, device=device) for _ in range(2)]
    return loss, *floats, *bools, torch.empty(batch, slopes, device=device)


def loss_scratch(batch: int, sums: int, chunks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    floats = torch.empty(batch * sums * (1 + chunks), dtype=torch.float64, device=device)
    return floats, arrivals_of(batch + 1, device)
