"""The policy loss in Triton: one launch per direction.

A program takes one chunk of one velocity row, with every sample of that row. The last program of a
sample adds its sums, the last of all makes the statistics and the loss (loss_triton).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS
from flowkern.ops._common.loss_reference import log_clip
from flowkern.ops._common.loss_triton import (
    advantage_of,
    chunk_sums,
    clipped_policy,
    group_is_complete,
    group_of,
    is_silent,
    loss_scratch,
    mean_of,
    new_residual,
    next_place,
    packed_siblings,
    put_down,
    reduce,
    row_is_complete,
    row_place,
    sample_at,
    samples_of,
    share_of,
    span_of,
    takes_more,
)
from flowkern.ops._common.outputs import loss_outputs
from flowkern.ops._common.philox_triton import noise_of, packed_noise
from flowkern.ops._common.rows_triton import (
    cut,
    guided,
    launch,
    load,
    packed_edges,
    packed_latent,
    step_mean,
    store,
)

from .inputs import PolicyInputs

# Latents and edges as in rows_triton, source as in philox_triton, the rest as in loss_triton.
# out:     what loss_outputs makes
# held:    the chunk of the row: velocity (guided), x_t, old_velocity, velocity_ref
# residual: a latent that forward leaves to backward, or None
# scalars: advantage, old_log_prob, step_weight, kl_coef: (B,) float32, or None
# bounds:  of the log-ratio

_INTEGERS = ["step_value", "key_low", "key_high", "batch", "chunks"]


@triton.jit
def _next(x_next, source, mean_old, std, sample, first, count, STREAM, BLOCK: tl.constexpr):
    """x_next of a sample, stored or drawn again."""
    if x_next is not None:
        value = load(x_next, sample, first, count, BLOCK)
    else:
        noise = noise_of(source, sample, first, tl.where(std != 0, count, 0), STREAM, BLOCK)
        value = tl.where(std != 0, mean_old + std * noise, mean_old)
    return value


@triton.jit
def _residual(value, mean_old, edge, x, v, GUARD: tl.constexpr):
    """What slopes[0] multiplies in the gradient (policy_loss.h)."""
    return value - mean_old if GUARD else value - step_mean(edge, x, v)


@triton.jit
def _serve(
    scratch, residual, x_next, source, held, edge, sample, place,
    RECORDED: tl.constexpr, GUARD: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums one sample over the chunk."""
    v, x, v_old, v_ref = held
    first = place[2] * BLOCK
    count = place[4] - first
    sums = ()
    if x is not None:
        mean_old = step_mean(edge, x, v_old)
        std = tl.load(edge + 2)
        value = _next(x_next, source, mean_old, std, sample, first, count, STREAM, BLOCK)
        if residual is not None:
            kept = _residual(value, mean_old, edge, x, v, GUARD)
            store(residual, sample, first, count, kept, BLOCK)
        e = value - mean_old
        d = tl.load(edge + 1) * (v - v_old)
        if RECORDED:
            q = e * e
        elif GUARD:
            q = e * d
        else:
            q = d * (2.0 * e - d)
        sums += (chunk_sums(q, count, BLOCK),)
    if v_ref is not None:
        drift = v - v_ref
        sums += (chunk_sums(drift * drift, count, BLOCK),)
    put_down(scratch, sums, sample, place, BLOCK)


@triton.jit
def _statistics(
    out, scratch, scalars, bounds, kl_value, guidance_scale, siblings, edges_ptr, edge_stride,
    group, place, OFF_POLICY: tl.constexpr, KL: tl.constexpr, GUARD: tl.constexpr,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the means of a group of samples say, in float64."""
    loss_ptr, log_ratio_ptr, ratio_ptr, kl_ptr, low_ptr, high_ptr, slopes_ptr = out
    advantage_ptr, old_log_prob_ptr, step_weight_ptr, kl_coef_ptr = scalars
    inner = guidance_scale * share_of(place, REDUCTION)
    sample = samples_of(group, place)
    edge = edges_ptr + sample * edge_stride
    b, std = tl.load(edge + 1).to(tl.float64), tl.load(edge + 2).to(tl.float64)
    k, c = tl.load(edge + 3).to(tl.float64), tl.load(edge + 4)
    inverse_std = tl.where(std != 0, 1.0 / tl.where(std != 0, std, 1.0), 0.0)
    log_ratio = tl.zeros(sample.shape, tl.float32)
    if OFF_POLICY:
        q = mean_of(scratch, 0, sample, place)
        if old_log_prob_ptr is not None:  # rounded as the old one was
            log_ratio = (c - k * q).to(tl.float32) - tl.load(old_log_prob_ptr + sample)
        else:
            log_ratio = (q * (inverse_std if GUARD else k)).to(tl.float32)
            if GUARD:  # 0 where std is 0, whatever the data
                log_ratio = tl.where(std != 0, log_ratio, 0.0)
    advantage = advantage_of(advantage_ptr, siblings, sample, place)
    loss, slope, clipped_low, clipped_high = clipped_policy(advantage, log_ratio, bounds)
    slope *= b * (inverse_std if GUARD else 2.0 * k)
    if step_weight_ptr is not None:
        weight = tl.load(step_weight_ptr + sample)
        loss, slope = loss * weight, slope * weight
    kl = tl.zeros(sample.shape, tl.float64)
    kl_slope = kl
    if KL:
        coef = kl_value if kl_coef_ptr is None else tl.load(kl_coef_ptr + sample)
        scale = b * inverse_std * b * inverse_std
        kl = scale / 2 * mean_of(scratch, OFF_POLICY, sample, place)
        loss += coef * kl
        kl_slope = coef * scale
    # A slope that vanishes is silent where a sum has seen the data; else it is -0, by bits:
    # Triton takes a -0.0 for 0.
    is_seen = (sample >= 0) & OFF_POLICY
    if GUARD:
        is_seen &= std != 0
    vanished = tl.where(is_seen, 0, -2147483648).to(tl.float32, bitcast=True)
    slope = (slope * inner).to(tl.float32)
    tl.store(slopes_ptr + sample * 2, tl.where(slope != 0, slope, vanished))
    tl.store(slopes_ptr + sample * 2 + 1, kl_slope * inner)
    tl.store(log_ratio_ptr + sample, log_ratio)
    tl.store(ratio_ptr + sample, tl.exp(log_ratio.to(tl.float64)))
    tl.store(kl_ptr + sample, kl)
    tl.store(low_ptr + sample, clipped_low)
    tl.store(high_ptr + sample, clipped_high)
    reduce(loss_ptr, scratch, OFF_POLICY + KL, loss, group, place, REDUCTION, BLOCK)


@triton.jit(do_not_specialize=_INTEGERS)
def _forward_kernel(
    out, residual, scratch, scalars, bounds, kl_value,  # out, in: one per sample
    siblings, edges_ptr, edge_stride, x_next, x_t, velocity, uncond, guidance_scale, old, ref,  # in
    noise, sample_id_ptr, step_ptr, step_value, key_low, key_high, batch, chunks, size,
    GUARD: tl.constexpr, REDUCTION: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = row_place(batch, chunks, size)
    first = place[2] * BLOCK
    count = size - first
    v, x, v_old, v_ref = None, None, None, None
    if old is not None or scalars[1] is not None:
        v = guided(velocity, uncond, guidance_scale, row, first, count, BLOCK)
        x = load(x_t, row, first, count, BLOCK)
        v_old = v if old is None else load(old, row, first, count, BLOCK)
    if ref is not None:
        v = guided(velocity, uncond, guidance_scale, row, first, count, BLOCK) if v is None else v
        v_ref = load(ref, row, first, count, BLOCK)
    held = v, x, v_old, v_ref
    source = noise, sample_id_ptr, step_ptr, step_value, key_low, key_high
    RECORDED: tl.constexpr = scalars[1] is not None
    OFF_POLICY: tl.constexpr = x is not None
    KL: tl.constexpr = v_ref is not None
    begin, end = span_of(siblings, row, place)
    at = next_place(siblings, None, 0, row, begin, end, place)
    while at < end:
        sample = sample_at(siblings, row, at)
        edge = edges_ptr + sample * edge_stride
        _serve(
            scratch, residual, x_next, source, held, edge, sample, place,
            RECORDED, GUARD, STREAM, BLOCK,
        )  # fmt: skip
        at = next_place(siblings, None, 0, row, at + 1, end, place)
    if row_is_complete(scratch, row, place):
        at = next_place(siblings, None, 0, row, begin, end, place)
        while at < end:
            sample = sample_at(siblings, row, at)
            if group_is_complete(scratch, OFF_POLICY + KL, sample, place, BLOCK):
                _statistics(
                    out, scratch, scalars, bounds, kl_value, guidance_scale, siblings, edges_ptr,
                    edge_stride, group_of(sample), place, OFF_POLICY, KL, GUARD, REDUCTION, BLOCK,
                )  # fmt: skip
            at = next_place(siblings, None, 0, row, at + 1, end, place)


@triton.jit(do_not_specialize=_INTEGERS)
def _backward_kernel(
    grad_velocity,  # out
    grad_ptr, grad_stride, slopes_ptr, siblings, edges_ptr, edge_stride,
    x_next, x_t, velocity, uncond, guidance_scale, old, ref,
    noise, sample_id_ptr, step_ptr, step_value, key_low, key_high,
    batch, chunks, size,
    GUARD: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = row_place(batch, chunks, size)
    first = place[2] * BLOCK
    count = size - first
    source = noise, sample_id_ptr, step_ptr, step_value, key_low, key_high
    total = tl.zeros((BLOCK,), tl.float32)
    begin, end = span_of(siblings, row, place)
    at = next_place(siblings, slopes_ptr, 2, row, begin, end, place)
    if at < end:
        v = guided(velocity, uncond, guidance_scale, row, first, count, BLOCK)
        x = load(x_t, row, first, count, BLOCK)
        v_old = v if old is None else load(old, row, first, count, BLOCK)
        if ref is not None:
            drift = v - load(ref, row, first, count, BLOCK)
        while at < end:
            sample = sample_at(siblings, row, at)
            edge = edges_ptr + sample * edge_stride
            grad = tl.load(grad_ptr + sample * grad_stride)
            slope = tl.load(slopes_ptr + sample * 2)
            read = tl.where(is_silent(slope), 0, count)
            mean_old = step_mean(edge, x, v_old)
            std = tl.load(edge + 2)
            value = _next(x_next, source, mean_old, std, sample, first, read, STREAM, BLOCK)
            gradient = slope * _residual(value, mean_old, edge, x, v, GUARD)
            if ref is not None:
                gradient += tl.load(slopes_ptr + sample * 2 + 1) * drift
            total += grad * gradient
            at = next_place(siblings, slopes_ptr, 2, row, at + 1, end, place)
    store(grad_velocity, row, first, count, total, BLOCK)


@triton.jit(do_not_specialize=["batch", "chunks"])
def _backward_kept_kernel(
    residual,  # in, and out: the gradient
    grad_ptr, grad_stride, slopes_ptr, velocity, uncond, guidance_scale, ref, batch, chunks, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = row_place(batch, chunks, size, BACKWARDS=True)
    first = place[2] * BLOCK
    count = size - first
    slope = tl.load(slopes_ptr + row * 2)
    is_used = ~is_silent(slope)
    gradient = slope * load(residual, row, first, tl.where(is_used, count, 0), BLOCK)
    if ref is not None:
        kl_slope = tl.load(slopes_ptr + row * 2 + 1)
        read = tl.where(is_silent(kl_slope), 0, count)
        v = guided(velocity, uncond, guidance_scale, row, first, read, BLOCK)
        gradient += kl_slope * (v - load(ref, row, first, read, BLOCK))
        is_used |= ~is_silent(kl_slope)
    grad = tl.load(grad_ptr + row * grad_stride)
    store(residual, row, first, count, tl.where(is_used, grad * gradient, 0.0), BLOCK)


def forward(i: PolicyInputs, records: bool) -> tuple[Tensor | None, ...]:
    """The fields of PolicyLoss, the slopes (B, 2), and the residual or None."""
    batch, rows = i.advantage.shape[0], i.velocity.shape[0]
    off_policy = i.old_velocity is not None or i.old_log_prob is not None
    states = (i.x_next, i.x_t) if off_policy else (None, None)  # 0 whatever these are
    sums = off_policy + (i.velocity_ref is not None)
    may_grow = takes_more(i.velocity, i.row) and states[0] is not None
    made = cut(i.velocity, may_grow=may_grow)
    if not sums:  # nothing of size D is read
        made = made._replace(chunks=1)
    out = loss_outputs(batch, 3, 2, i.reduction, i.velocity.device)
    residual = new_residual(i.velocity, i.row, records and off_policy)
    scratch = loss_scratch(i.velocity, batch, sums, made.sums)
    is_each = isinstance(i.kl_coef, Tensor)
    kl_coef, kl_value = (i.kl_coef, 0.0) if is_each else (None, i.kl_coef)
    if batch:
        launch(
            _forward_kernel, i.velocity, made,
            out, packed_latent(residual), scratch,
            (i.advantage, i.old_log_prob, i.step_weight, kl_coef),
            log_clip(i.clip_low, i.clip_high), float(kl_value), packed_siblings(i.row, rows),
            *packed_edges(i.c_rows), *_latents(i, *states), batch, made.chunks,
            GUARD=i.ratio == "guard", REDUCTION=i.reduction, STREAM=STREAMS["step"],
        )  # fmt: skip
    return *out, residual


def backward(grad: Tensor, slopes: Tensor, i: PolicyInputs, residual: Tensor | None) -> Tensor:
    if residual is not None:
        return _backward_kept(grad, slopes, i, residual)
    grad_velocity = torch.empty(i.velocity.shape, dtype=i.velocity.dtype, device=i.velocity.device)
    if i.velocity.numel():
        made = cut(i.velocity)
        launch(
            _backward_kernel, i.velocity, made,
            packed_latent(grad_velocity), grad.contiguous(), grad.ndim, slopes,
            packed_siblings(i.row, i.velocity.shape[0]),
            *packed_edges(i.c_rows), *_latents(i, i.x_next, i.x_t), slopes.shape[0], made.chunks,
            GUARD=i.ratio == "guard", STREAM=STREAMS["step"],
        )  # fmt: skip
    return grad_velocity


def _backward_kept(grad: Tensor, slopes: Tensor, i: PolicyInputs, residual: Tensor) -> Tensor:
    """The gradient in the residual's memory."""
    if residual.numel():
        of_kl = (i.velocity, i.velocity_uncond) if i.velocity_ref is not None else (None, None)
        made = cut(residual)
        launch(
            _backward_kept_kernel, residual, made,
            packed_latent(residual), grad.contiguous(), grad.ndim, slopes,
            *map(packed_latent, of_kl), float(i.guidance_scale), packed_latent(i.velocity_ref),
            slopes.shape[0], made.chunks,
        )  # fmt: skip
    return residual


def _latents(i: PolicyInputs, x_next: Tensor | None, x_t: Tensor | None) -> tuple:
    latents = map(packed_latent, (x_next, x_t, i.velocity, i.velocity_uncond))
    anchors = map(packed_latent, (i.old_velocity, i.velocity_ref))
    return *latents, float(i.guidance_scale), *anchors, *packed_noise(i.source)
