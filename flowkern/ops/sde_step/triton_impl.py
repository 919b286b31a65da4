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

from .inputs import StepInputs

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
    result, x_next, x0,  # out
    x_t, velocity, uncond, guidance_scale, history, edges_ptr, edge_stride,  # in
    noise, sample_id_ptr, step_ptr, step_value, key_low, key_high, size,  # in: noise or its key
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
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

    stored = value.to(x_next[0].dtype.element_ty)
    store(x_next, sample, first, count, stored, BLOCK)
    if x0 is not None:
        store(x0, sample, first, count, x - tl.load(edge + 8) * v, BLOCK)
    if result is not None:  # of the sample as it is stored, after rounding
        residual = stored.to(tl.float32) - mean
        _log_prob(result, edge, residual, sample, chunk, chunks, size, BLOCK)


@triton.jit
def _sde_replay_kernel(
    result,  # out
    x_next, x_t, velocity, uncond, guidance_scale, edges_ptr, edge_stride, size,  # in
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, chunks = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    edge = edges_ptr + sample * edge_stride
    x = load(x_t, sample, first, count, BLOCK)
    v = guided(velocity, uncond, guidance_scale, sample, first, count, BLOCK)
    residual = load(x_next, sample, first, count, BLOCK) - step_mean(edge, x, v)
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


def draw(
    i: StepInputs, source: Noise, x_next: Tensor, log_prob: Tensor | None, x0: Tensor | None
) -> None:
    if i.x_t.numel() == 0:
        if log_prob is not None:
            log_prob.copy_(i.edges[..., 4])
        return
    inputs = _inputs(i.x_t, i.velocity, i.velocity_uncond, i.guidance_scale)
    made = cut(i.x_t, may_grow=log_prob is not None)
    out = _result(i.x_t, log_prob, made), packed_latent(x_next), packed_latent(x0)
    key = source.sample_id, source.step, source.step_value, *key_halves(source.seed)
    launch(
        _sde_draw_kernel, i.x_t, made,
        *out, *inputs, tuple(map(packed_latent, i.history)), *packed_edges(i.edges),
        packed_latent(source.given), *key,
        STREAM=STREAMS["step"],
    )  # fmt: skip


def replay(x_t, velocity, x_next, edges, velocity_uncond, guidance_scale) -> Tensor:
    log_prob = torch.empty(x_t.shape[0], dtype=torch.float32, device=x_t.device)
    if x_t.numel() == 0:
        return log_prob.copy_(edges[..., 4])
    inputs = _inputs(x_t, velocity, velocity_uncond, guidance_scale)
    made = cut(x_t, may_grow=True)
    out = _result(x_t, log_prob, made)
    launch(_sde_replay_kernel, x_t, made, out, packed_latent(x_next), *inputs, *packed_edges(edges))
    return log_prob


def replay_backward(grad, x_t, velocity, x_next, edges, velocity_uncond, guidance_scale) -> Tensor:
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    if x_t.numel() == 0:
        return grad_velocity
    inputs = _inputs(x_t, velocity, velocity_uncond, guidance_scale)
    out = packed_latent(grad_velocity)
    launch(
        _sde_replay_backward_kernel, x_t, cut(x_t),
        out, grad.contiguous(), packed_latent(x_next), *inputs, *packed_edges(edges),
    )  # fmt: skip
    return grad_velocity


def _inputs(x_t, velocity, velocity_uncond, guidance_scale) -> tuple:
    return (
        packed_latent(x_t),
        packed_latent(velocity),
        packed_latent(velocity_uncond),
        float(guidance_scale),
    )


def _result(x_t: Tensor, log_prob: Tensor | None, cut: Cut) -> tuple[Tensor, Tensor, Tensor] | None:
    if log_prob is None:
        return None
    batch = x_t.shape[0]
    return log_prob, *scratch(x_t, batch * cut.sums, batch)
