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
    chunk_sums,
    group_is_complete,
    group_of,
    loss_scratch,
    new_residual,
    next_place,
    packed_siblings,
    put_down,
    row_is_complete,
    row_place,
    sample_at,
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

from .inputs import GHUBER_POWER, WEIGHTINGS, MatchingInputs
from .statistics_triton import statistics

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
def _mixed(v, v_old, beta):
    """Where nft's beta, which is None for 1, puts a velocity."""
    if beta is not None and v_old is not None:
        v = v_old + beta * (v - v_old)
    return v


@triton.jit
def _serve(
    scratch, residual, x0, source, held, sample, place,
    NFT: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums one sample over the chunk."""
    v, towards, v_old, v_ref, v_ema = held
    first = place[2] * BLOCK
    count = place[4] - first
    u = _target(x0, source, sample, first, count, STREAM, BLOCK)
    plus = towards - u
    if residual is not None:
        store(residual, sample, first, count, plus, BLOCK)
    sums = (chunk_sums(plus * plus, count, BLOCK),)
    if NFT:
        sums += (chunk_sums(tl.abs(plus), count, BLOCK),)
        if v_old is not None:
            minus = (2.0 * v_old - towards) - u
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


@triton.jit(do_not_specialize=_INTEGERS)
def _forward_kernel(
    out, residual, scratch, scalars, values, bounds,  # out, in: one per sample
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
    held = v, _mixed(v, v_old, values[3]), v_old, v_ref, v_ema
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
                statistics(
                    out, scratch, scalars, values, bounds, siblings,
                    group_of(sample), place, old is not None, REF, EMA,
                    NFT, WEIGHTING, REDUCTION, BLOCK,
                )  # fmt: skip
            at = next_place(siblings, None, 0, row, at + 1, end, place)


@triton.jit(do_not_specialize=_INTEGERS)
def _backward_kernel(
    grad_velocity,  # out
    grad_ptr, grad_stride, slopes_ptr, siblings, beta, x0, velocity, old, ref, ema,  # in
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
            towards, v_old = v, None
            if old is not None:
                is_read = read if beta is not None else tl.where(minus_slope != 0, count, 0)
                v_old = load(old, row, first, is_read, BLOCK)
                towards = _mixed(v, v_old, beta)
            gradient = slope * (towards - u)
            if old is not None:
                gradient += minus_slope * ((2.0 * v_old - towards) - u)
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
    more = sum(x is not None for x in (i.old_velocity, i.velocity_ref, i.velocity_ema))
    fits = i.noise is not None or more <= 1  # beside noise that is drawn there are few registers
    made = cut(i.velocity, may_grow=fits and takes_more(i.velocity, i.row))
    nft = i.objective == "nft"
    sums = sum(x is not None for x in (i.velocity, i.velocity_ref, i.velocity_ema))
    sums += nft + 2 * (i.old_velocity is not None)
    out = loss_outputs(batch, 5, 4, i.reduction, i.velocity.device)
    is_one_residual = not (nft and i.old_velocity is not None)
    residual = new_residual(i.velocity, i.row, records and is_one_residual)
    scratch = loss_scratch(i.velocity, batch, sums, made.sums)
    coefs = i.ref_coef, i.ema_coef
    each = tuple(x.contiguous() if isinstance(x, Tensor) else None for x in coefs)
    values = tuple(0.0 if isinstance(x, Tensor) else float(x) for x in coefs)
    values += None if i.ghuber_power == GHUBER_POWER else i.ghuber_power, _beta(i)
    if batch:
        launch(
            _forward_kernel, i.velocity, made,
            out, packed_latent(residual), scratch,
            (i.sigma.contiguous(), i.advantage.contiguous(), *each), values,
            log_clip(i.clip_low, i.clip_high), packed_siblings(i.row, rows),
            *_latents(i), batch, made.chunks,
            NFT=nft, WEIGHTING=WEIGHTINGS[i.objective].index(i.weighting), REDUCTION=i.reduction,
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
            packed_siblings(i.row, i.velocity.shape[0]), _beta(i),
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


def _beta(i: MatchingInputs) -> float | None:
    return None if i.nft_beta == 1 else i.nft_beta


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
