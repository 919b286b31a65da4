"""What the loss kernels share: the samples of a velocity row, their sums and statistics, the clip.

A program takes one chunk of one velocity row and serves every sample of that row, so that siblings
read their velocity once. The last program of a row adds its samples' sums, the last of 128
samples makes their statistics, the last group adds the losses, each in a fixed order: a sample's
depend on it alone.

place:    rows, batch, chunk, chunks, size
siblings: (None, None, None): each sample has a row of its own; or (row, None, None), row (B,): the
          samples of a row are looked for; or (row, order, begins): they are order[i] for i from
          begins[row] to begins[row + 1]
scratch:  (floats, arrivals): in float64 the means (sums, B) of the samples, what they are made of,
          (B, sums, chunks' sums), and the losses of groups; counters of rows, of groups, and of all
          groups, that are 0 before and after
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows_triton import ordered_total, partial_sums, scratch, sums_of, tree_sum

SCANNED = 1024  # the largest batch in which programs look for their samples: 32 loads in a row


@triton.constexpr_function
def group_size():
    """Of how many samples one program makes the statistics."""
    return 128


@triton.jit
def group_of(sample):
    return sample // group_size()


@triton.jit
def row_place(batch, chunks, size, BACKWARDS: tl.constexpr = False):
    """The velocity row, and its place, in a grid of rows x chunks, flat.

    BACKWARDS: the first programs, which run first, take the last chunks, of which caches still hold
    what a kernel before has written.
    """
    program = tl.program_id(0)
    if BACKWARDS:
        program = tl.num_programs(0) - 1 - program
    rows, chunk = tl.num_programs(0) // chunks, (program % chunks).to(tl.int64)
    return (program // chunks).to(tl.int64), (rows, batch, chunk, chunks, size)


@triton.jit
def span_of(siblings, row, place):
    """Where the samples of `row` are looked for: places from begin to end, of `next_place`.

    A row out of range, which nothing looks for on a GPU, counts as the nearest one: every sample is
    served, and `advantage_of` makes its loss NaN.
    """
    begin, end = tl.full((), 0, tl.int64), tl.full((), 1, tl.int64)  # known before it runs: no loop
    if siblings[0] is not None:
        end = place[1].to(tl.int64)
        if siblings[2] is not None:
            has_next = row < place[0] - 1
            begin = tl.where(row > 0, tl.load(siblings[2] + row), begin)
            end = tl.where(has_next, tl.load(siblings[2] + row + 1, mask=has_next, other=0), end)
    return begin, end


@triton.jit
def next_place(siblings, slopes_ptr, SLOPES: tl.constexpr, row, begin, end, place):
    """The first place from `begin` on with a sample of `row`; with slopes (B, SLOPES), one that has
    any. `end` where there is none.
    """
    found = begin
    if siblings[0] is None:
        if slopes_ptr is not None and begin < end:
            found = tl.where(_has_slope(slopes_ptr, SLOPES, row, True), begin, end)
    elif siblings[1] is None:
        found = end
        while (begin < end) & (found == end):
            sample = begin + tl.arange(0, 32)
            here = sample < end
            its_row = tl.load(siblings[0] + sample, mask=here, other=0)
            here &= tl.minimum(tl.maximum(its_row, 0), place[0] - 1) == row
            if slopes_ptr is not None:
                here &= _has_slope(slopes_ptr, SLOPES, sample, here)
            found = tl.min(tl.where(here, sample, end), axis=0)
            begin += 32
    elif slopes_ptr is not None:
        is_idle = begin < end
        while is_idle:
            is_idle = ~_has_slope(slopes_ptr, SLOPES, tl.load(siblings[1] + found), True)
            found += is_idle
            is_idle &= found < end
    return found


@triton.jit
def sample_at(siblings, row, at):
    sample = row
    if siblings[0] is not None:
        sample = at if siblings[1] is None else tl.load(siblings[1] + at)
    return sample


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
def chunk_sums(x, count, BLOCK: tl.constexpr):
    return partial_sums(tl.where(tl.arange(0, BLOCK) < count, x, 0.0))


@triton.jit
def put_down(scratch, sums, sample, place, BLOCK: tl.constexpr):
    """Stores the sums of a chunk of a sample."""
    _, batch, chunk, chunks, _ = place
    PARTS: tl.constexpr = sums_of(BLOCK)
    part = chunk * PARTS + tl.arange(0, PARTS)
    for j in tl.static_range(len(sums)):
        first = (batch + sample * chunks * PARTS) * len(sums) + j * chunks * PARTS
        tl.store(scratch[0] + first + part, sums[j])


@triton.jit
def row_is_complete(scratch, row, place):
    """Counts a chunk of a row; whether it was the last one."""
    is_last = tl.atomic_add(scratch[1] + row, 1, sem="acq_rel") == place[3] - 1
    if is_last:
        tl.store(scratch[1] + row, 0)
    return is_last


@triton.jit
def group_is_complete(scratch, SUMS: tl.constexpr, sample, place, BLOCK: tl.constexpr):
    """Makes the means of a sample whose row is complete; whether it was the last of its group."""
    floats_ptr, arrivals_ptr = scratch
    rows, batch, _, chunks, size = place
    parts = chunks * sums_of(BLOCK)
    for j in tl.static_range(SUMS):
        total = ordered_total(floats_ptr + (batch + sample * parts) * SUMS + j * parts, parts)
        tl.store(floats_ptr + j * batch + sample, total / tl.maximum(size, 1))
    group = group_of(sample)
    samples = tl.minimum(batch - group * group_size(), group_size())
    counter = arrivals_ptr + rows + group
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == samples - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def samples_of(group, place):
    """The samples of a group, as a vector: past the batch its last one again and again."""
    SIZE: tl.constexpr = group_size()
    return tl.minimum(group * SIZE + tl.arange(0, SIZE), place[1] - 1).to(tl.int64)


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
def advantage_of(advantage_ptr, siblings, sample, place):
    advantage = tl.load(advantage_ptr + sample)
    if siblings[0] is not None:
        row = tl.load(siblings[0] + sample)
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
def reduce(
    loss_ptr, scratch, SUMS: tl.constexpr, loss, group, place,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the losses of a group, or adds them to the loss of the batch."""
    rows, batch, _, chunks, _ = place
    if REDUCTION == "none":
        tl.store(loss_ptr + samples_of(group, place), loss)
    else:
        SIZE: tl.constexpr = group_size()
        groups = tl.cdiv(batch, SIZE)
        total = tree_sum(tl.where(group * SIZE + tl.arange(0, SIZE) < batch, loss, 0.0))
        is_last = groups == 1
        if groups > 1:
            totals_ptr = scratch[0] + batch * SUMS * (1 + chunks * sums_of(BLOCK))
            tl.store(totals_ptr + group, total)
            is_last = tl.atomic_add(scratch[1] + rows + groups, 1, sem="acq_rel") == groups - 1
            if is_last:
                total = ordered_total(totals_ptr, groups)
                tl.store(scratch[1] + rows + groups, 0)
        if is_last:
            tl.store(loss_ptr, total / batch if REDUCTION == "mean" else total)


def packed_siblings(row: Tensor | None, rows: int) -> tuple[Tensor | None, ...]:
    """`siblings` of the kernels.

    Up to SCANNED samples each program looks for its own; beyond, all would read too long.
    """
    if row is None:
        return None, None, None
    row = row.contiguous()
    if row.shape[0] <= SCANNED:
        return row, None, None
    in_order, order = torch.sort(row, stable=True)
    begins = torch.searchsorted(in_order, torch.arange(rows, device=row.device))
    return row, order, begins


def new_residual(velocity: Tensor, row: Tensor | None, records: bool) -> Tensor | None:
    """Memory for what the backward pass will multiply and write over, by the rule of the native
    kernels (csrc/common/loss_python.h); None where it is not kept.
    """
    is_kept = records and velocity.requires_grad and row is None and velocity.dtype == torch.float32
    return torch.empty_like(velocity, memory_format=torch.contiguous_format) if is_kept else None


def takes_more(velocity: Tensor, row: Tensor | None) -> bool:
    """Whether programs have registers left for a larger tile: those that loop over siblings have
    not, and with a velocity in float32 it gains nothing (docs/log.md).
    """
    return row is None and velocity.element_size() == 2


def loss_scratch(
    velocity: Tensor, batch: int, sums: int, sums_of_sample: int
) -> tuple[Tensor, Tensor]:
    """`scratch` of the kernels, for so many sums over each sample."""
    groups = -(-batch // group_size())
    floats = batch * sums * (1 + sums_of_sample) + groups
    return scratch(velocity, floats, velocity.shape[0] + groups + 1)
