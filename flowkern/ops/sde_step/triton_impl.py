"""The step in Triton: one launch per draw, per replay, per gradient.

A program takes one chunk of one sample. The last program of a sample to arrive adds the chunks'
sums in a fixed order: a log-probability depends on the sample alone, not on the batch, the order in
which programs ran or the kernel that asked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS, Noise, per_sample_contiguous
from flowkern.ops._common.dispatch import interpreting
from flowkern.ops._common.philox_triton import counter_word, key_halves, normals, program_place

# What the kernels take:
# a latent: (pointer, elements from sample to sample), each sample contiguous; None where absent
# row:      a sample's nine coefficients, in the order of schedules.COLUMNS
# result:   (log_prob (B,), sums (B, chunks), arrivals (B,) that are 0 before and after), or None


@triton.jit
def _load(latent, sample, first, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    pointer = latent[0] + sample * latent[1] + first
    return tl.load(pointer + lane, mask=lane < count, other=0.0).to(tl.float32)


@triton.jit
def _store(latent, sample, first, count, value, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    pointer = latent[0] + sample * latent[1] + first
    tl.store(pointer + lane, value.to(latent[0].dtype.element_ty), mask=lane < count)


@triton.jit
def _guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK: tl.constexpr):
    v = _load(velocity, sample, first, count, BLOCK)
    if uncond is not None:
        u = _load(uncond, sample, first, count, BLOCK)
        v = u + guidance_scale * (v - u)
    return v


@triton.jit
def _mean(row, x, v):
    return tl.load(row) * x + tl.load(row + 1) * v


@triton.jit
def _tree_sum(x):
    """The sum by neighboring pairs: the same bits whatever layout a kernel's compiler gives x."""
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            x = tl.sum(x.reshape(x.shape[0] // 2, 2), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def _log_prob(result, row, residual, sample, chunk, chunks, size, BLOCK: tl.constexpr):
    """c - k mean_D(residual^2), by the last program of the sample, which clears its arrivals."""
    log_prob_ptr, sums_ptr, arrivals_ptr = result
    sums_ptr += sample * chunks
    residual = tl.where(tl.arange(0, BLOCK) < size - chunk * BLOCK, residual, 0.0)
    tl.store(sums_ptr + chunk, _tree_sum(residual * residual))
    if tl.atomic_add(arrivals_ptr + sample, 1, sem="acq_rel") == chunks - 1:
        lane = tl.arange(0, 1024)
        total = tl.zeros((1024,), tl.float64)
        begin = 0
        while begin < chunks:
            sums = tl.load(sums_ptr + begin + lane, mask=lane < chunks - begin, other=0.0)
            total += sums.to(tl.float64)
            begin += 1024
        k, c = tl.load(row + 3).to(tl.float64), tl.load(row + 4).to(tl.float64)
        tl.store(log_prob_ptr + sample, (c - k * (_tree_sum(total) / size)).to(tl.float32))
        tl.store(arrivals_ptr + sample, 0)


@triton.jit(do_not_specialize=["step_value", "key_low", "key_high"])
def _sde_draw_kernel(
    result, x_next, x0,  # out
    x_t, velocity, uncond, guidance_scale, history, rows_ptr, row_stride,  # in
    noise, sample_id_ptr, step_ptr, step_value, key_low, key_high, size,  # in: noise or its key
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, chunks = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    row = rows_ptr + sample * row_stride
    std = tl.load(row + 2)

    x = _load(x_t, sample, first, count, BLOCK)
    v = _guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK)
    mean = _mean(row, x, v)
    for j in tl.static_range(len(history)):
        mean += tl.load(row + 5 + j) * _load(history[j], sample, first, count, BLOCK)
    value = mean
    if noise is not None:  # std == 0 never reads it
        e = _load(noise, sample, first, tl.where(std != 0, count, 0), BLOCK)
        value = tl.where(std != 0, mean + std * e, mean)
    if sample_id_ptr is not None:
        step = step_value if step_ptr is None else tl.load(step_ptr + sample)
        word, sample_id = counter_word(step, STREAM), tl.load(sample_id_ptr + sample)
        e = normals(first, word, sample_id, key_low, key_high, BLOCK)
        value = tl.where(std != 0, mean + std * e, mean)

    stored = value.to(x_next[0].dtype.element_ty)
    _store(x_next, sample, first, count, stored, BLOCK)
    if x0 is not None:
        _store(x0, sample, first, count, x - tl.load(row + 8) * v, BLOCK)
    if result is not None:  # of the sample as it is stored, after rounding
        residual = stored.to(tl.float32) - mean
        _log_prob(result, row, residual, sample, chunk, chunks, size, BLOCK)


@triton.jit
def _sde_replay_kernel(
    result,  # out
    x_next, x_t, velocity, uncond, guidance_scale, rows_ptr, row_stride, size,  # in
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, chunks = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    row = rows_ptr + sample * row_stride
    x = _load(x_t, sample, first, count, BLOCK)
    v = _guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK)
    residual = _load(x_next, sample, first, count, BLOCK) - _mean(row, x, v)
    _log_prob(result, row, residual, sample, chunk, chunks, size, BLOCK)


@triton.jit
def _sde_replay_backward_kernel(
    grad_velocity,  # out
    grad_ptr, x_next, x_t, velocity, uncond, guidance_scale, rows_ptr, row_stride, size,  # in
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, _ = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    row = rows_ptr + sample * row_stride
    x = _load(x_t, sample, first, count, BLOCK)
    v = _guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK)
    residual = _load(x_next, sample, first, count, BLOCK) - _mean(row, x, v)
    scale = tl.load(grad_ptr + sample) * 2.0 * tl.load(row + 3) * tl.load(row + 1)
    if uncond is not None:
        scale *= guidance_scale
    slope = tl.div_rn(scale, size * 1.0) * residual
    _store(grad_velocity, sample, first, count, slope, BLOCK)


def draw(
    x_t: Tensor,
    velocity: Tensor,
    rows: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    history: Sequence[Tensor],
    source: Noise,
    x_next: Tensor,
    log_prob: Tensor | None,
    x0: Tensor | None,
) -> None:
    if x_t.numel() == 0:
        if log_prob is not None:
            log_prob.copy_(rows[..., 4])
        return
    inputs = _inputs(x_t, velocity, velocity_uncond, guidance_scale)
    out = _result(x_t, log_prob), _latent(x_next), _latent(x0)
    key = source.sample_id, source.step, source.step_value, *key_halves(source.seed)
    _launch(
        _sde_draw_kernel, x_t,
        *out, *inputs, tuple(map(_latent, history)), *_rows(rows), _latent(source.given), *key,
        STREAM=STREAMS["step"],
    )  # fmt: skip


def replay(x_t, velocity, x_next, rows, velocity_uncond, guidance_scale) -> Tensor:
    log_prob = torch.empty(x_t.shape[0], dtype=torch.float32, device=x_t.device)
    if x_t.numel() == 0:
        return log_prob.copy_(rows[..., 4])
    inputs = _inputs(x_t, velocity, velocity_uncond, guidance_scale)
    out = _result(x_t, log_prob)
    _launch(_sde_replay_kernel, x_t, out, _latent(x_next), *inputs, *_rows(rows))
    return log_prob


def replay_backward(grad, x_t, velocity, x_next, rows, velocity_uncond, guidance_scale) -> Tensor:
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    if x_t.numel() == 0:
        return grad_velocity
    inputs = _inputs(x_t, velocity, velocity_uncond, guidance_scale)
    out = _latent(grad_velocity)
    _launch(
        _sde_replay_backward_kernel, x_t,
        out, grad.contiguous(), _latent(x_next), *inputs, *_rows(rows),
    )  # fmt: skip
    return grad_velocity


def _inputs(x_t, velocity, velocity_uncond, guidance_scale) -> tuple:
    return _latent(x_t), _latent(velocity), _latent(velocity_uncond), float(guidance_scale)


def _latent(x: Tensor | None) -> tuple[Tensor, int] | None:
    if x is None:
        return None
    x = per_sample_contiguous(x)
    return x, x.stride(0)


def _rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows and their stride: 0 where one edge serves all samples."""
    rows = rows.contiguous()
    return rows, 0 if rows.ndim == 1 else rows.stride(0)


def tile(size: int) -> tuple[int, int]:
    """(elements, warps) of a program.

    By the size of a sample alone: the tile orders the sum, and a replay in any batch repeats it.
    Eight elements per thread are one 128-bit load of bf16, two of float32.
    """
    if interpreting():  # there a program costs the same at any length
        return 2**16, 1
    return (1024, 4) if size <= 2**18 else (2048, 8)


def _launch(kernel, x_t: Tensor, *arguments, **constants) -> None:
    size = x_t.numel() // x_t.shape[0]
    block, warps = tile(size)
    with torch.cuda.device_of(x_t):
        kernel[(x_t.shape[0] * triton.cdiv(size, block),)](
            *arguments, size, BLOCK=block, num_warps=warps, enable_fp_fusion=False, **constants
        )


def _result(x_t: Tensor, log_prob: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    if log_prob is None:
        return None
    batch = x_t.shape[0]
    chunks = triton.cdiv(x_t.numel() // batch, tile(x_t.numel() // batch)[0])
    with torch.cuda.device_of(x_t):
        sums = torch.empty(batch * chunks, dtype=torch.float32, device=x_t.device)
        return log_prob, sums, _arrivals(batch, x_t.device)


def _arrivals(batch: int, device: torch.device) -> Tensor:
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
