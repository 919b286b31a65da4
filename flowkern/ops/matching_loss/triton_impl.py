"""The matching losses and their noising in Triton: one launch per direction.

A program takes one chunk of one velocity row, with every sample of that row. The last program of a
sample adds its sums, the last of all makes the statistics and the loss (loss_triton).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS, Noise
from flowkern.ops._common.loss_reference import log_clip
from flowkern.ops._common.loss_triton import (
    advantage_of,
    chunk_sums,
    clipped_policy,
    group_is_complete,
    group_of,
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
from flowkern.ops._common.philox_triton import noise_of, packed_noise, program_place
from flowkern.ops._common.rows_triton import (
    cut,
    launch,
    load,
    packed_latent,
    store,
)

from .inputs import WEIGHTINGS, MatchingInputs

# Latents as in rows_triton, source as in philox_triton, the rest as in loss_triton.
# out:    what loss_outputs makes
# held:   the chunk of the row: velocity, old_velocity, velocity_ref, velocity_ema
# residual: a latent that forward leaves to backward, or None
# coefs:  ref_coef, ema_coef
# bounds: of the log-ratio

_INTEGERS = ["step_value", "key_low", "key_high", "batch", "chunks"]


@triton.jit
def _target(x0, source, sample, first, count, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """u, the velocity to match."""
    x = load(x0, sample, first, count, BLOCK)  # on its way while noise is drawn
    return noise_of(source, sample, first, count, STREAM, BLOCK) - x


@triton.jit
def _serve(
    scratch, residual, x0, source, held, sample, place,
    NFT: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums one sample over the chunk."""
    v, v_old, v_ref, v_ema = held
    first = place[2] * BLOCK
    count = place[4] - first
    u = _target(x0, source, sample, first, count, STREAM, BLOCK)
    plus = v - u
    if residual is not None:
        store(residual, sample, first, count, plus, BLOCK)
    sums = (chunk_sums(plus * plus, count, BLOCK),)
    if NFT:
        sums += (chunk_sums(tl.abs(plus), count, BLOCK),)
        if v_old is not None:
            minus = (2.0 * v_old - v) - u
            sums += (chunk_sums(minus * minus, count, BLOCK),)
            sums += (chunk_sums(tl.abs(minus), count, BLOCK),)
    elif v_old is not None:
        old = v_old - u
        sums += (chunk_sums((v - v_old) * (plus + old), count, BLOCK),)
        sums += (chunk_sums(old * old, count, BLOCK),)
    if v_ref is not None:
        sums += (chunk_sums((v - v_ref) * (v - v_ref), count, BLOCK),)
    if v_ema is not None:
        sums += (chunk_sums((v - v_ema) * (v - v_ema), count, BLOCK),)
    put_down(scratch, sums, sample, place, BLOCK)


@triton.jit
def _statistics(
    out, scratch, sigma_ptr, advantage_ptr, siblings, coefs, bounds, group, place,
    OLD: tl.constexpr, REF: tl.constexpr, EMA: tl.constexpr, NFT: tl.constexpr,
    WEIGHTING: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the means of a group of samples say, in float64."""
    loss_ptr, log_ratio_ptr, ratio_ptr, matching_ptr, ref_ptr, ema_ptr = out[:6]
    low_ptr, high_ptr, slopes_ptr = out[6:]
    FIRST_ANCHOR: tl.constexpr = 1 + NFT + 2 * OLD
    share = 2.0 * share_of(place, REDUCTION)
    sample = samples_of(group, place)
    t = tl.load(sigma_ptr + sample).to(tl.float64)
    advantage = advantage_of(advantage_ptr, siblings, sample, place)
    zero = tl.zeros(sample.shape, tl.float64)
    if NFT:
        matching, slope, minus_slope = _nft(t, advantage, scratch, sample, place, OLD)
        loss, log_ratio = 5 * matching, zero.to(tl.float32)
        clipped_low, clipped_high = log_ratio != 0, log_ratio != 0
    else:
        matching = mean_of(scratch, 0, sample, place)
        log_ratio, slope = _awm(t, matching, scratch, sample, place, OLD, WEIGHTING)
        loss, policy, clipped_low, clipped_high = clipped_policy(advantage, log_ratio, bounds)
        slope *= policy
        minus_slope = zero
    ref, ema = zero, zero
    if REF:
        ref = mean_of(scratch, FIRST_ANCHOR, sample, place)
        loss += coefs[0] * ref
    if EMA:
        ema = mean_of(scratch, FIRST_ANCHOR + REF, sample, place)
        loss += coefs[1] * ema
    # Not -0, which would be read: matching looks at all data.
    tl.store(slopes_ptr + sample * 4, tl.where(slope != 0, slope * share, 0.0))
    tl.store(slopes_ptr + sample * 4 + 1, tl.where(minus_slope != 0, minus_slope * share, 0.0))
    tl.store(slopes_ptr + sample * 4 + 2, zero + coefs[0] * share)
    tl.store(slopes_ptr + sample * 4 + 3, zero + coefs[1] * share)
    tl.store(log_ratio_ptr + sample, log_ratio)
    tl.store(ratio_ptr + sample, tl.exp(log_ratio.to(tl.float64)))
    tl.store(matching_ptr + sample, matching)
    tl.store(ref_ptr + sample, ref)
    tl.store(ema_ptr + sample, ema)
    tl.store(low_ptr + sample, clipped_low)
    tl.store(high_ptr + sample, clipped_high)
    SUMS: tl.constexpr = FIRST_ANCHOR + REF + EMA
    reduce(loss_ptr, scratch, SUMS, loss, group, place, REDUCTION, BLOCK)


@triton.jit
def _nft(t, advantage, scratch, sample, place, OLD: tl.constexpr):
    """The matching of a sample, and the slopes of 5 of it in the halves of both squares."""
    r = 0.5 + 0.5 * advantage.to(tl.float64)
    r = tl.where(r < 0, 0.0, tl.where(r > 1, 1.0, r))
    square, weight = mean_of(scratch, 0, sample, place), _weight(t, 1, scratch, sample, place)
    plus, minus = r * weight, (1 - r) * weight
    if OLD:
        minus = (1 - r) * _weight(t, 3, scratch, sample, place)
        matching = plus * square + minus * mean_of(scratch, 2, sample, place)
        slope, minus_slope = 5 * plus, -5 * minus
    else:  # both residuals are one
        matching = (plus + minus) * square
        slope = 5 * (plus - minus)
        minus_slope = tl.zeros_like(slope)
    return matching, slope, minus_slope


@triton.jit
def _weight(t, j, scratch, sample, place):
    """t^2 / w: residuals count in units of their own mean size, which has no gradient."""
    w = t * mean_of(scratch, j, sample, place)
    return t * t / tl.where(w < 1e-5, 1e-5, w)


@triton.jit
def _awm(t, m, scratch, sample, place, OLD: tl.constexpr, WEIGHTING: tl.constexpr):
    """log p - log p_old, in float32, and d log p / d M.

    ghuber: with fourth roots, a - b = (a^4 - b^4) / ((a^2 + b^2) (a + b)).
    """
    drift, m_old = tl.where(m == m, 0.0, m), m
    if OLD:
        drift = mean_of(scratch, 1, sample, place)
        m_old = mean_of(scratch, 2, sample, place)
    if WEIGHTING == 2:
        root, old_root = tl.sqrt(m + 1e-10), tl.sqrt(m_old + 1e-10)
        a, b = tl.sqrt(root), tl.sqrt(old_root)
        log_ratio, slope = -4 * t * drift / ((root + old_root) * (a + b)), -t / (root * a)
    else:
        slope = -t if WEIGHTING == 1 else tl.full(t.shape, -1.0, tl.float64)
        log_ratio = slope * drift
    return log_ratio.to(tl.float32), slope


@triton.jit(do_not_specialize=_INTEGERS)
def _forward_kernel(
    out, residual, scratch, sigma_ptr, advantage_ptr, coefs, bounds,  # out, in: one per sample
    siblings, x0, velocity, old, ref, ema,  # in
    noise, sample_id_ptr, step_ptr, step_value, key_low, key_high, batch, chunks, size,
    NFT: tl.constexpr, WEIGHTING: tl.constexpr, REDUCTION: tl.constexpr,
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = row_place(batch, chunks, size)
    first = place[2] * BLOCK
    count = size - first
    v = load(velocity, row, first, count, BLOCK)
    v_old, v_ref, v_ema = None, None, None
    if old is not None:
        v_old = load(old, row, first, count, BLOCK)
    if ref is not None:
        v_ref = load(ref, row, first, count, BLOCK)
    if ema is not None:
        v_ema = load(ema, row, first, count, BLOCK)
    held = v, v_old, v_ref, v_ema
    source = noise, sample_id_ptr, step_ptr, step_value, key_low, key_high
    REF: tl.constexpr = ref is not None
    EMA: tl.constexpr = ema is not None
    SUMS: tl.constexpr = 1 + NFT + 2 * (old is not None) + REF + EMA
    begin, end = span_of(siblings, row, place)
    at = next_place(siblings, None, 0, row, begin, end, place)
    while at < end:
        sample = sample_at(siblings, row, at)
        _serve(scratch, residual, x0, source, held, sample, place, NFT, STREAM, BLOCK)
        at = next_place(siblings, None, 0, row, at + 1, end, place)
    if row_is_complete(scratch, row, place):
        at = next_place(siblings, None, 0, row, begin, end, place)
        while at < end:
            sample = sample_at(siblings, row, at)
            if group_is_complete(scratch, SUMS, sample, place, BLOCK):
                _statistics(
                    out, scratch, sigma_ptr, advantage_ptr, siblings, coefs, bounds,
                    group_of(sample), place, old is not None, REF, EMA,
                    NFT, WEIGHTING, REDUCTION, BLOCK,
                )  # fmt: skip
            at = next_place(siblings, None, 0, row, at + 1, end, place)


@triton.jit(do_not_specialize=_INTEGERS)
def _backward_kernel(
    grad_velocity,  # out
    grad_ptr, grad_stride, slopes_ptr, siblings, x0, velocity, old, ref, ema,  # in
    noise, sample_id_ptr, step_ptr, step_value, key_low, key_high, batch, chunks, size,
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = row_place(batch, chunks, size)
    first = place[2] * BLOCK
    count = size - first
    source = noise, sample_id_ptr, step_ptr, step_value, key_low, key_high
    total = tl.zeros((BLOCK,), tl.float32)
    begin, end = span_of(siblings, row, place)
    at = next_place(siblings, slopes_ptr, 4, row, begin, end, place)
    if at < end:
        v = load(velocity, row, first, count, BLOCK)
        while at < end:
            sample = sample_at(siblings, row, at)
            slopes = slopes_ptr + sample * 4
            slope, minus_slope = tl.load(slopes), tl.load(slopes + 1)
            ref_slope, ema_slope = tl.load(slopes + 2), tl.load(slopes + 3)
            grad = tl.load(grad_ptr + sample * grad_stride)
            # What a slope of 0 multiplies is not read; the second sample of a row finds the row's
            # latents in cache.
            read = tl.where((slope != 0) | (minus_slope != 0), count, 0)
            u = _target(x0, source, sample, first, read, STREAM, BLOCK)
            gradient = slope * (v - u)
            if old is not None:
                v_old = load(old, row, first, tl.where(minus_slope != 0, count, 0), BLOCK)
                gradient += minus_slope * ((2.0 * v_old - v) - u)
            if ref is not None:
                v_ref = load(ref, row, first, tl.where(ref_slope != 0, count, 0), BLOCK)
                gradient += ref_slope * (v - v_ref)
            if ema is not None:
                v_ema = load(ema, row, first, tl.where(ema_slope != 0, count, 0), BLOCK)
                gradient += ema_slope * (v - v_ema)
            total += grad * gradient
            at = next_place(siblings, slopes_ptr, 4, row, at + 1, end, place)
    store(grad_velocity, row, first, count, total, BLOCK)


@triton.jit(do_not_specialize=["batch", "chunks"])
def _backward_kept_kernel(
    residual,  # in, and out: the gradient
    grad_ptr, grad_stride, slopes_ptr, velocity, ref, ema, batch, chunks, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, place = row_place(batch, chunks, size, BACKWARDS=True)
    first = place[2] * BLOCK
    count = size - first
    slopes = slopes_ptr + row * 4
    slope = tl.load(slopes)
    is_used = slope != 0
    gradient = slope * load(residual, row, first, tl.where(is_used, count, 0), BLOCK)
    if velocity is not None:
        ref_slope, ema_slope = tl.load(slopes + 2), tl.load(slopes + 3)
        has_anchor = (ref_slope != 0) | (ema_slope != 0)
        v = load(velocity, row, first, tl.where(has_anchor, count, 0), BLOCK)
        if ref is not None:
            of_ref = tl.where(ref_slope != 0, count, 0)
            v_ref = load(ref, row, first, of_ref, BLOCK)
            gradient += ref_slope * (v - v_ref)
        if ema is not None:
            of_ema = tl.where(ema_slope != 0, count, 0)
            v_ema = load(ema, row, first, of_ema, BLOCK)
            gradient += ema_slope * (v - v_ema)
        is_used |= has_anchor
    grad = tl.load(grad_ptr + row * grad_stride)
    store(residual, row, first, count, tl.where(is_used, grad * gradient, 0.0), BLOCK)


@triton.jit(do_not_specialize=_INTEGERS[:3])
def _add_noise_kernel(
    x_t,  # out
    x0, sigma_ptr, noise, sample_id_ptr, step_ptr, step_value, key_low, key_high, size,  # in
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, _ = program_place(size, BLOCK)
    first = chunk * BLOCK
    count = size - first
    source = noise, sample_id_ptr, step_ptr, step_value, key_low, key_high
    x = load(x0, sample, first, count, BLOCK)
    e = noise_of(source, sample, first, count, STREAM, BLOCK)
    t = tl.load(sigma_ptr + sample)
    store(x_t, sample, first, count, (1.0 - t) * x + t * e, BLOCK)


def forward(i: MatchingInputs, records: bool) -> tuple[Tensor | None, ...]:
    """The fields of MatchingLoss, the slopes (B, 4), and the residual or None."""
    batch, rows = i.x0.shape[0], i.velocity.shape[0]
    made = cut(i.velocity, may_grow=takes_more(i.velocity, i.row))
    nft = i.objective == "nft"
    sums = sum(x is not None for x in (i.velocity, i.velocity_ref, i.velocity_ema))
    sums += nft + 2 * (i.old_velocity is not None)
    out = loss_outputs(batch, 5, 4, i.reduction, i.velocity.device)
    is_one_residual = not (nft and i.old_velocity is not None)
    residual = new_residual(i.velocity, i.row, records and is_one_residual)
    scratch = loss_scratch(i.velocity, batch, sums, made.sums)
    if batch:
        launch(
            _forward_kernel, i.velocity, made,
            out, packed_latent(residual), scratch, i.sigma.contiguous(), i.advantage.contiguous(),
            (float(i.ref_coef), float(i.ema_coef)), log_clip(i.clip_low, i.clip_high),
            packed_siblings(i.row, rows), *_latents(i), batch, made.chunks,
            NFT=nft, WEIGHTING=WEIGHTINGS.index(i.weighting), REDUCTION=i.reduction,
            STREAM=STREAMS["match"],
        )  # fmt: skip
    return *out, residual


def backward(grad: Tensor, slopes: Tensor, i: MatchingInputs, residual: Tensor | None) -> Tensor:
    if residual is not None:
        return _backward_kept(grad, slopes, i, residual)
    grad_velocity = torch.empty(i.velocity.shape, dtype=i.velocity.dtype, device=i.velocity.device)
    if i.velocity.numel():
        made = cut(i.velocity)
        launch(
            _backward_kernel, i.velocity, made,
            packed_latent(grad_velocity), grad.contiguous(), grad.ndim, slopes,
            packed_siblings(i.row, i.velocity.shape[0]),
            *_latents(i), slopes.shape[0], made.chunks, STREAM=STREAMS["match"],
        )  # fmt: skip
    return grad_velocity


def _backward_kept(grad: Tensor, slopes: Tensor, i: MatchingInputs, residual: Tensor) -> Tensor:
    """The gradient in the residual's memory."""
    if residual.numel():
        has_anchor = i.velocity_ref is not None or i.velocity_ema is not None
        latents = (i.velocity if has_anchor else None, i.velocity_ref, i.velocity_ema)
        made = cut(residual)
        launch(
            _backward_kept_kernel, residual, made,
            packed_latent(residual), grad.contiguous(), grad.ndim, slopes,
            *map(packed_latent, latents), slopes.shape[0], made.chunks,
        )  # fmt: skip
    return residual


def _latents(i: MatchingInputs) -> tuple:
    latents = (i.x0, i.velocity, i.old_velocity, i.velocity_ref, i.velocity_ema)
    return *map(packed_latent, latents), *packed_noise(i.source)


def add_noise(x0: Tensor, sigma: Tensor, source: Noise) -> Tensor:
    x_t = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    if x0.numel():
        launch(
            _add_noise_kernel, x0, cut(x0, may_grow=True),
            packed_latent(x_t), packed_latent(x0), sigma.contiguous(), *packed_noise(source),
            STREAM=STREAMS["match"],
        )  # fmt: skip
    return x_t
