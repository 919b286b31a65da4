"""What the sums of a sample become in the matching losses, in Triton: loss, statistics, slopes.

scalars: (sigma, advantage, ref_coef, ema_coef), (B,) each, or None for a coefficient of `values`
values:  (ref_coef, ema_coef, ghuber_power, nft_beta); None for the published power, and for 1
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowkern.ops._common.loss_triton import (
    advantage_of,
    clipped_policy,
    mean_of,
    reduce,
    samples_of,
    share_of,
)


@triton.jit
def statistics(
    out, scratch, scalars, values, bounds, siblings, group, place,
    OLD: tl.constexpr, REF: tl.constexpr, EMA: tl.constexpr, NFT: tl.constexpr,
    WEIGHTING: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the means of a group of samples say, in float64."""
    loss_ptr, log_ratio_ptr, ratio_ptr, matching_ptr, ref_ptr, ema_ptr = out[:6]
    low_ptr, high_ptr, slopes_ptr = out[6:]
    sigma_ptr, advantage_ptr, ref_coef_ptr, ema_coef_ptr = scalars
    ref_coef, ema_coef, power, beta = values
    FIRST_ANCHOR: tl.constexpr = 1 + NFT + 2 * OLD
    share = 2.0 * share_of(place, REDUCTION)
    sample = samples_of(group, place)
    t = tl.load(sigma_ptr + sample).to(tl.float64)
    advantage = advantage_of(advantage_ptr, siblings, sample, place)
    zero = tl.zeros(sample.shape, tl.float64)
    if NFT:
        matching, slope, minus_slope = _nft(t, advantage, scratch, sample, place, OLD, WEIGHTING)
        loss, log_ratio = 5 * matching, zero.to(tl.float32)
        if beta is not None:
            loss /= beta
        clipped_low, clipped_high = log_ratio != 0, log_ratio != 0
    else:
        matching = mean_of(scratch, 0, sample, place)
        log_ratio, slope = _awm(t, matching, power, scratch, sample, place, OLD, WEIGHTING)
        loss, policy, clipped_low, clipped_high = clipped_policy(advantage, log_ratio, bounds)
        slope *= policy
        minus_slope = zero
    ref, ema = zero, zero
    if ref_coef_ptr is not None:
        ref_coef = tl.load(ref_coef_ptr + sample)
    if ema_coef_ptr is not None:
        ema_coef = tl.load(ema_coef_ptr + sample)
    if REF:
        ref = mean_of(scratch, FIRST_ANCHOR, sample, place)
        loss += ref_coef * ref
    if EMA:
        ema = mean_of(scratch, FIRST_ANCHOR + REF, sample, place)
        loss += ema_coef * ema
    # Not -0, which would be read: matching looks at all data.
    tl.store(slopes_ptr + sample * 4, tl.where(slope != 0, slope * share, 0.0))
    tl.store(slopes_ptr + sample * 4 + 1, tl.where(minus_slope != 0, minus_slope * share, 0.0))
    tl.store(slopes_ptr + sample * 4 + 2, zero + ref_coef * share)
    tl.store(slopes_ptr + sample * 4 + 3, zero + ema_coef * share)
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
def _nft(t, advantage, scratch, sample, place, OLD: tl.constexpr, WEIGHTING: tl.constexpr):
    """The matching of a sample, and the slopes of 5 of it in the halves of both squares; beta is in
    none: what it divides the loss by, the mixed velocities have as their slope.
    """
    r = 0.5 + 0.5 * advantage.to(tl.float64)
    r = tl.where(r < 0, 0.0, tl.where(r > 1, 1.0, r))
    square = mean_of(scratch, 0, sample, place)
    weight = _weight(t, 1, scratch, sample, place, WEIGHTING)
    plus, minus = r * weight, (1 - r) * weight
    if OLD:
        minus = (1 - r) * _weight(t, 3, scratch, sample, place, WEIGHTING)
        matching = plus * square + minus * mean_of(scratch, 2, sample, place)
        slope, minus_slope = 5 * plus, -5 * minus
    else:  # both residuals are one
        matching = (plus + minus) * square
        slope = 5 * (plus - minus)
        minus_slope = tl.zeros_like(slope)
    return matching, slope, minus_slope


@triton.jit
def _weight(t, j, scratch, sample, place, WEIGHTING: tl.constexpr):
    """t^2 / w: residuals count in units of their own mean size, which has no gradient; or t^2."""
    weight = t * t
    if WEIGHTING == 0:
        w = t * mean_of(scratch, j, sample, place)
        weight /= tl.where(w < 1e-5, 1e-5, w)
    return weight


@triton.jit
def _awm(t, m, power, scratch, sample, place, OLD: tl.constexpr, WEIGHTING: tl.constexpr):
    """log p - log p_old, in float32, and d log p / d M.

    ghuber: with fourth roots, a - b = (a^4 - b^4) / ((a^2 + b^2) (a + b)); with another power, of
    the change of log M, which is made of M where 1 + change has lost its digits. In float64 log and
    exp keep the digits for which float32 needs log1p and expm1.
    """
    drift, m_old = tl.where(m == m, 0.0, m), m
    if OLD:
        drift = mean_of(scratch, 1, sample, place)
        m_old = mean_of(scratch, 2, sample, place)
    if WEIGHTING == 2 and power is not None:
        m, m_old = m + 1e-10, m_old + 1e-10
        change = drift / m_old
        log_change = tl.log(tl.where(change < -0.5, m / m_old, 1.0 + change))
        log_ratio = -t / power * tl.exp(power * tl.log(m_old)) * (tl.exp(power * log_change) - 1)
        slope = -t * tl.exp((power - 1) * tl.log(m))
    elif WEIGHTING == 2 or WEIGHTING == 4:
        root, old_root = tl.sqrt(m + 1e-10), tl.sqrt(m_old + 1e-10)
        if WEIGHTING == 4:
            log_ratio, slope = -t * drift / (root + old_root), -0.5 * t / root
        else:
            a, b = tl.sqrt(root), tl.sqrt(old_root)
            log_ratio, slope = -4 * t * drift / ((root + old_root) * (a + b)), -t / (root * a)
    else:
        slope = -t if WEIGHTING == 1 else tl.full(t.shape, -1.0, tl.float64)
        if WEIGHTING == 3:
            slope = -t * t
        log_ratio = slope * drift
    return log_ratio.to(tl.float32), slope
