"""The step in Triton: one launch per draw, per replay, per gradient.

A program takes one chunk of one sample. The last program of a sample to arrive adds the chunks'
sums in a fixed order: a log-probability depends on the sample alone, not on the batch, the order in
which programs ran or the kernel that asked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS, Noise
from flowkern.ops._common.philox_triton import counter_word, key_halves, normals, program_place
from flowkern.ops._common.rows_triton import (
    Cut,
    cut,
    guided,
    launch,
    load,
    ordered_total,
    packed_edges,
    packed_latent,
    partial_sums,
    scratch,
    step_mean,
    store,
    sums_of,
)

from .inputs import FromMean, StepInputs, StepOutputs

# Latents and edges as in rows_triton.
# result: (log_prob (B,), partial sums, arrivals (B,) that are 0 before and after), or None


@triton.jit
def _log_prob(result, edge, residual, sample, chunk, chunks, size, BLOCK: tl.constexpr):
    """c - k mean_D(residual^2), by the last program of the sample, which clears its arrivals."""
    log_prob_ptr, sums_ptr, arrivals_ptr = result
    SUMS: tl.constexpr = sums_of(BLOCK)
    sums_ptr += sample * chunks * SUMS
    residual = tl.where(tl.arange(0, BLOCK) < size - chunk * BLOCK, residual, 0.0)
    tl.store(sums_ptr + chunk * SUMS + tl.arange(0, SUMS), partial_sums(residual * residual))
    if tl.atomic_add(arrivals_ptr + sample, 1, sem="acq_rel") == chunks - 1:
        k, c = tl.load(edge + 3).to(tl.float64), tl.load(edge + 4).to(tl.float64)
        log_prob = c - k * (ordered_total(sums_ptr, chunks * SUMS) / size)
        tl.store(log_prob_ptr + sample, log_prob.to(tl.float32))
        tl.store(arrivals_ptr + sample, 0)


@triton.jit(do_not_specialize=["step_value", "key_low", "key_high"])
def _sde_draw_kernel(
    result, x_next, x0, mean_out,  # out
    x_t, velocity, uncond, guidance_scale, history, edges_ptr, edge_stride,  # in
    noise, sample_id_ptr, step_ptr, step_value, key_low, key_high, size,  # in: noise or its key
    STREAM: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, chunks = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    edge = edges_ptr + sample * edge_stride
    std = tl.load(edge + 2)

    x = load(x_t, sample, first, count, BLOCK)
    v = guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK)
    mean = step_mean(edge, x, v)
    for j in tl.static_range(len(history)):
        mean += tl.load(edge + 5 + j) * load(history[j], sample, first, count, BLOCK)
    value = mean
    if noise is not None:  # std == 0 never reads it
        e = load(noise, sample, first, tl.where(std != 0, count, 0), BLOCK)
        value = tl.where(std != 0, mean + std * e, mean)
    if sample_id_ptr is not None:
        step = step_value if step_ptr is None else tl.load(step_ptr + sample)
        word, sample_id = counter_word(step, STREAM), tl.load(sample_id_ptr + sample)
        e = normals(first, word, sample_id, key_low, key_high, BLOCK)
        value = tl.where(std != 0, mean + std * e, mean)

    if ROUND is not None:
        value = value.to(ROUND).to(tl.float32)
    stored = value.to(x_next[0].dtype.element_ty)
    store(x_next, sample, first, count, stored, BLOCK)
    if x0 is not None:
        store(x0, sample, first, count, x - tl.load(edge + 8) * v, BLOCK)
    if mean_out is not None:
        store(mean_out, sample, first, count, mean, BLOCK)
    if result is not None:  # of the sample as it is stored, after rounding
        residual = stored.to(tl.float32) - mean
        _log_prob(result, edge, residual, sample, chunk, chunks, size, BLOCK)


@triton.jit
def _sde_replay_kernel(
    result, mean_out,  # out
    x_next, x_t, velocity, uncond, guidance_scale, edges_ptr, edge_stride, size,  # in
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, chunks = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    edge = edges_ptr + sample * edge_stride
    x = load(x_t, sample, first, count, BLOCK)
    v = guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK)
    mean = step_mean(edge, x, v)
    if mean_out is not None:
        store(mean_out, sample, first, count, mean, BLOCK)
    residual = load(x_next, sample, first, count, BLOCK) - mean
    _log_prob(result, edge, residual, sample, chunk, chunks, size, BLOCK)


@triton.jit
def _sde_replay_backward_kernel(
    grad_velocity,  # out
    grad_ptr, x_next, x_t, velocity, uncond, guidance_scale, edges_ptr, edge_stride, size,  # in
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, _ = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    edge = edges_ptr + sample * edge_stride
    x = load(x_t, sample, first, count, BLOCK)
    v = guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK)
    residual = load(x_next, sample, first, count, BLOCK) - step_mean(edge, x, v)
    scale = tl.load(grad_ptr + sample) * 2.0 * tl.load(edge + 3) * tl.load(edge + 1)
    if uncond is not None:
        scale *= guidance_scale
    slope = tl.div_rn(scale, size * 1.0) * residual
    store(grad_velocity, sample, first, count, slope, BLOCK)


@triton.jit
def _sde_mean_backward_kernel(
    grad_velocity,  # out
    grad_ptr, grad_mean, x_next, mean, edges_ptr, edge_stride, scale, size,  # in
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, _ = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    edge = edges_ptr + sample * edge_stride
    slope = tl.zeros((BLOCK,), tl.float32)
    if grad_ptr is not None:
        residual = load(x_next, sample, first, count, BLOCK) - load(
            mean, sample, first, count, BLOCK
        )
        by_log_prob = tl.load(grad_ptr + sample) * 2.0 * tl.load(edge + 3) * tl.load(edge + 1)
        slope = tl.div_rn(by_log_prob * scale, size * 1.0) * residual
    if grad_mean is not None:
        by_mean = tl.load(edge + 1) * scale  # d mean / d velocity
        slope += by_mean * load(grad_mean, sample, first, count, BLOCK)
    store(grad_velocity, sample, first, count, slope, BLOCK)


def draw(i: StepInputs, source: Noise, out: StepOutputs) -> None:
    if i.x_t.numel() == 0:
        if out.log_prob is not None:
            out.log_prob.copy_(i.edges[..., 4])
        return
    made = cut(i.x_t, may_grow=out.log_prob is not None)
    written = map(packed_latent, (out.x_next, out.x0, out.mean))
    key = source.sample_id, source.step, source.step_value, *key_halves(source.seed)
    launch(
        _sde_draw_kernel, i.x_t, made,
        _result(i.x_t, out.log_prob, made), *written, *_inputs(i),
        tuple(map(packed_latent, i.history)), *packed_edges(i.edges),
        packed_latent(source.given), *key,
        STREAM=STREAMS["step"], ROUND=_ROUNDED[out.round_dtype],
    )  # fmt: skip


_ROUNDED = {None: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def replay(i: StepInputs, x_next: Tensor) -> Tensor:
    return _replayed(i, x_next, None)


def replay_mean(i: StepInputs, x_next: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.empty(i.x_t.shape, dtype=torch.float32, device=i.x_t.device)
    return _replayed(i, x_next, mean), mean


def _replayed(i: StepInputs, x_next: Tensor, mean: Tensor | None) -> Tensor:
    """The log-probability; the mean is written where there is one."""
    log_prob = torch.empty(i.x_t.shape[0], dtype=torch.float32, device=i.x_t.device)
    if i.x_t.numel() == 0:
        return log_prob.copy_(i.edges[..., 4])
    made = cut(i.x_t, may_grow=True)
    out = _result(i.x_t, log_prob, made), packed_latent(mean)
    launch(
        _sde_replay_kernel, i.x_t, made,
        *out, packed_latent(x_next), *_inputs(i), *packed_edges(i.edges),
    )  # fmt: skip
    return log_prob


def replay_backward(grad: Tensor, i: StepInputs, x_next: Tensor) -> Tensor:
    grad_velocity = torch.empty(i.velocity.shape, dtype=i.velocity.dtype, device=i.velocity.device)
    if i.x_t.numel() == 0:
        return grad_velocity
    launch(
        _sde_replay_backward_kernel, i.x_t, cut(i.x_t),
        packed_latent(grad_velocity),
        grad.contiguous(), packed_latent(x_next), *_inputs(i), *packed_edges(i.edges),
    )  # fmt: skip
    return grad_velocity


def mean_backward(
    grad: Tensor | None, grad_mean: Tensor | None, of: FromMean, dtype: torch.dtype
) -> Tensor:
    grad_velocity = torch.empty(of.mean.shape, dtype=dtype, device=of.mean.device)
    if of.mean.numel() == 0:
        return grad_velocity
    read = (packed_latent(of.x_next), packed_latent(of.mean)) if grad is not None else (None, None)
    grad = None if grad is None else grad.contiguous()
    launch(
        _sde_mean_backward_kernel, of.mean, cut(of.mean),
        packed_latent(grad_velocity),
        grad, packed_latent(grad_mean), *read, *packed_edges(of.edges), float(of.scale),
    )  # fmt: skip
    return grad_velocity


def _inputs(i: StepInputs) -> tuple:
    latents = map(packed_latent, (i.x_t, i.velocity, i.velocity_uncond))
    return *latents, float(i.guidance_scale)


def _result(x_t: Tensor, log_prob: Tensor | None, cut: Cut) -> tuple[Tensor, Tensor, Tensor] | None:
    if log_prob is None:
        return None
    batch = x_t.shape[0]
    return log_prob, *scratch(x_t, batch * cut.sums, batch)
