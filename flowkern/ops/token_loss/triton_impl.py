"""The row kernel in Triton: a program takes one token's logits, and reads them once for what they
say and once more to overwrite them with their gradient.

logits:  (n, V), 16 bits or float32, before softcap and temperature
In 16 bits the logit of the token itself, which its log-probability rests on, is computed again in
float32, and takes the place of the rounded one in the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.ops._common.dispatch import interpreting

from .inputs import LARGEST_LOG_RATIO, Head, Objective, Statistics, Tokens

# head:    weight, its stride, bias or None, 1 / temperature, softcap
# token:   hidden, its stride, ids
# given:   old_log_prob, advantage, token_weight, ref_log_prob, sample_log_prob, or None
# numbers: kl_coef, entropy_coef, log_low, log_high, log_dual, is_cap
# out:     log_prob, ratio, kl, entropy, loss, clipped
# sums:    the largest logit, the logarithm of the sum of exp(logit - largest), the entropy

_INTERPRETED = interpreting()  # settled when triton is imported
TILE = (2**16, 1) if _INTERPRETED else (4096, 8)  # logits that a program has at a time, warps


@triton.constexpr_function
def vector():
    """Logits that a thread folds by itself before it touches its sums."""
    return 8


@triton.constexpr_function
def farthest():
    """What stands for -inf below the largest logit: its exp is 0, and 0 times it is 0."""
    return -10000.0


@triton.jit
def _tanh(x):
    """By an odd polynomial near 0, where 1 - 2 / (exp(2 x) + 1) cancels."""
    square = x * x
    odd = 17.0 / 315 - square * (62.0 / 2835)
    odd = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * odd)))
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.25, odd, tl.where(x < 0, -far, far))


@triton.jit
def _scaled(x, head, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = head[4] * _tanh(x / head[4])
    return x * head[3]


@triton.jit
def _places(BLOCK: tl.constexpr):
    WIDE: tl.constexpr = vector()
    return tl.arange(0, BLOCK // WIDE)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]


@triton.jit
def _read(
    row_ptr, begin, count, head, SOFTCAP: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of the row from `begin` on; -inf past its end."""
    place = begin + _places(BLOCK)
    if WHOLE:
        z = _scaled(tl.load(row_ptr + place).to(tl.float32), head, SOFTCAP)
    else:
        x = tl.load(row_ptr + place, mask=place < count, other=0.0).to(tl.float32)
        z = tl.where(place < count, _scaled(x, head, SOFTCAP), float("-inf"))
    return z


@triton.jit
def _below(z, top):
    return tl.where(z == float("-inf"), farthest(), z - top)


@triton.jit
def _fold(z, top, total, moment):
    """Adds a block to what a thread knows: the largest logit, and the sums of e and of e u, with
    u = z - largest and e = exp(u).
    """
    higher = tl.maximum(top, tl.max(z, axis=1))
    u = _below(z, higher[:, None])
    e = tl.exp(u)
    fall = top - higher
    keep = tl.exp(fall)
    moment = keep * (moment + total * fall) + tl.sum(e * u, axis=1)
    return higher, keep * total + tl.sum(e, axis=1), moment


@triton.jit
def _but_for(z, begin, without, BLOCK: tl.constexpr):
    """A block of the row with -inf at `without`, where that is no None."""
    if without is not None:
        z = tl.where(begin + _places(BLOCK) == without, float("-inf"), z)
    return z


@triton.jit
def _fold_row(row_ptr, count, head, without, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """(largest, sum of e, sum of e u) of a row, but for the logit at `without`."""
    LANES: tl.constexpr = BLOCK // vector()
    top = tl.full((LANES,), -1e30, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        z = _read(row_ptr, begin, count, head, SOFTCAP, True, BLOCK)
        top, total, moment = _fold(_but_for(z, begin, without, BLOCK), top, total, moment)
    if whole < count:
        z = _read(row_ptr, whole, count, head, SOFTCAP, False, BLOCK)
        top, total, moment = _fold(_but_for(z, whole, without, BLOCK), top, total, moment)
    largest = tl.max(top, axis=0)
    fall = top - largest
    keep = tl.exp(fall)
    moment = tl.sum(keep * (moment + total * fall), axis=0)
    return largest, tl.sum(keep * total, axis=0), moment


@triton.jit
def _dot(token, head, row, id, size, BLOCK: tl.constexpr):
    """The logit of a token in float32, before softcap and temperature."""
    hidden_ptr = token[0] + row * token[1]
    weight_ptr = head[0] + id * head[1]
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, size, BLOCK):
        here = begin + lane < size
        h = tl.load(hidden_ptr + begin + lane, mask=here, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + begin + lane, mask=here, other=0.0).to(tl.float32)
        total += h * w
    x = tl.sum(total, axis=0)
    if head[2] is not None:
        x += tl.load(head[2] + id).to(tl.float32)
    return x


@triton.jit
def _target(logits, token, head, row, size, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The id, whether there is such a token, and its logit in float32."""
    id = tl.load(token[2] + row)
    is_known = (id >= 0) & (id < logits[2])
    id = tl.where(is_known, id, 0)
    if logits[0].dtype.element_ty == tl.float32:
        z = tl.load(logits[0] + row * logits[1] + id)
    else:
        z = _dot(token, head, row, id, size, 1024 if BLOCK > 1024 else BLOCK)
    return id, is_known, _scaled(z, head, SOFTCAP)


@triton.jit
def _sums(logits, head, row, target, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The log-probability of the target, and `sums` of the row."""
    row_ptr = logits[0] + row * logits[1]
    id, is_known, exact = target
    if logits[0].dtype.element_ty == tl.float32:
        largest, total, moment = _fold_row(row_ptr, logits[2], head, None, SOFTCAP, BLOCK)
    else:  # the rounded one, taken from the sum afterwards, could take all of it along
        rest, total, moment = _fold_row(row_ptr, logits[2], head, id, SOFTCAP, BLOCK)
        largest = tl.where(exact > rest, exact, rest)
        fall, u = rest - largest, _below(exact, largest)
        keep, e = tl.exp(fall), tl.exp(u)
        moment = keep * (moment + total * fall) + e * u
        total = keep * total + e
    log_total = tl.log(total)
    log_prob = tl.where(is_known, (exact - largest) - log_total, float("nan"))
    return log_prob, (largest, log_total, log_total - moment / total)


@triton.jit
def _overwrite(
    logits, head, row, target, sums, slope, entropy_slope,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient in the logits, in their place, of slope log_prob - entropy_slope entropy."""
    row_ptr = logits[0] + row * logits[1]
    whole = logits[2] // BLOCK * BLOCK
    id, _, exact = target
    at_target = _slope_of(exact, head, sums, slope, entropy_slope, True, SOFTCAP)
    for begin in range(0, whole, BLOCK):
        z = _read(row_ptr, begin, logits[2], head, SOFTCAP, True, BLOCK)
        place = begin + _places(BLOCK)
        dz = _slope_of(z, head, sums, slope, entropy_slope, False, SOFTCAP)
        dz = tl.where(place == id, at_target, dz)
        tl.store(row_ptr + place, dz.to(logits[0].dtype.element_ty))
    if whole < logits[2]:
        z = _read(row_ptr, whole, logits[2], head, SOFTCAP, False, BLOCK)
        place = whole + _places(BLOCK)
        dz = _slope_of(z, head, sums, slope, entropy_slope, False, SOFTCAP)
        dz = tl.where(place == id, at_target, dz)
        tl.store(row_ptr + place, dz.to(logits[0].dtype.element_ty), mask=place < logits[2])


@triton.jit
def _slope_of(z, head, sums, slope, entropy_slope, IS_TARGET: tl.constexpr, SOFTCAP: tl.constexpr):
    largest, log_total, entropy = sums
    u = _below(z, largest) - log_total
    p = tl.exp(u)
    dz = p * (entropy_slope * (u + entropy) - slope)
    if IS_TARGET:
        dz += slope
    dz *= head[3]
    if SOFTCAP:
        t = z / (head[3] * head[4])
        dz *= 1.0 - t * t
    return dz


@triton.jit
def _optional(ptr, row, otherwise):
    return otherwise if ptr is None else tl.load(ptr + row).to(tl.float64)


@triton.jit
def _policy(given, numbers, log_prob, entropy, row, LARGEST: tl.constexpr):
    """What a token adds to the loss, its slopes in log_prob and in minus the entropy, and the
    statistics; in float64, where exp keeps the digits for which float32 needs expm1.
    """
    kl_coef, entropy_coef, log_low, log_high, log_dual, is_cap = numbers
    log_prob = log_prob.to(tl.float64)
    advantage = tl.load(given[1] + row).to(tl.float64)
    weight = tl.load(given[2] + row).to(tl.float64)
    old = _optional(given[0], row, log_prob)
    full = log_prob - old
    log_ratio = tl.where(full > LARGEST, LARGEST, tl.where(full < -LARGEST, -LARGEST, full))
    low = (advantage < 0) & (log_ratio < log_low)
    high = (advantage > 0) & (log_ratio > log_high)
    capped = (advantage < 0) & (log_ratio > log_dual)
    kept = tl.where(low, log_low, tl.where(high, log_high, tl.where(capped, log_dual, log_ratio)))
    clipped = low | high | capped
    loss = -advantage * tl.exp(kept.to(tl.float64))
    slope = tl.where(clipped | (full != log_ratio) & (full == full), 0.0, loss)
    if given[4] is not None:
        correction = tl.exp(old - tl.load(given[4] + row).to(tl.float64))
        correction = tl.where(correction > is_cap, is_cap, correction)
        loss, slope = loss * correction, slope * correction
    kl = tl.zeros((), tl.float64)
    if given[3] is not None:
        drift = tl.load(given[3] + row).to(tl.float64) - log_prob
        grown = tl.exp(drift)
        kl = grown - 1.0 - drift
        loss += kl_coef * kl
        slope += kl_coef * (1.0 - grown)
    loss = weight * (loss - entropy_coef * entropy)
    slopes = (weight * slope).to(tl.float32), (weight * entropy_coef).to(tl.float32)
    return loss, slopes, (tl.exp(log_ratio), kl, clipped)


@triton.jit
def _policy_kernel(
    logits_ptr, stride, token, head, given, numbers, out, count, size,
    LARGEST: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr, stride, count
    target = _target(logits, token, head, row, size, SOFTCAP, BLOCK)
    log_prob, sums = _sums(logits, head, row, target, SOFTCAP, BLOCK)
    loss, slopes, said = _policy(given, numbers, log_prob, sums[2], row, LARGEST)
    tl.store(out[0] + row, log_prob)
    tl.store(out[1] + row, said[0])
    tl.store(out[2] + row, said[1])
    tl.store(out[3] + row, sums[2])
    tl.store(out[4] + row, loss)
    tl.store(out[5] + row, said[2])
    if GRADIENT:
        _overwrite(logits, head, row, target, sums, slopes[0], slopes[1], SOFTCAP, BLOCK)


@triton.jit
def _log_prob_kernel(
    logits_ptr, stride, token, head, out, count, size,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr, stride, count
    target = _target(logits, token, head, row, size, SOFTCAP, BLOCK)
    log_prob, sums = _sums(logits, head, row, target, SOFTCAP, BLOCK)
    tl.store(out[0] + row, log_prob)
    tl.store(out[1] + row, sums[0])
    tl.store(out[2] + row, sums[1])


@triton.jit
def _gradient_kernel(
    logits_ptr, stride, token, head, given, count, size,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr, stride, count
    target = _target(logits, token, head, row, size, SOFTCAP, BLOCK)
    sums = tl.load(given[0] + row), tl.load(given[1] + row), 0.0
    _overwrite(logits, head, row, target, sums, tl.load(given[2] + row), 0.0, SOFTCAP, BLOCK)


def policy_rows(
    logits: Tensor,
    head: Head,
    tokens: Tokens,
    objective: Objective,
    out: Statistics,
    with_gradient: bool,
) -> None:
    """Fills `out`; overwrites the logits with their gradient, where one is wanted."""
    given = tokens[2:]
    numbers = tuple(map(float, objective))
    _launch(
        _policy_kernel, logits, head, tokens.hidden, tokens.ids, given, numbers, tuple(out),
        LARGEST=LARGEST_LOG_RATIO, GRADIENT=with_gradient,
    )  # fmt: skip


def log_prob_rows(
    logits: Tensor, head: Head, hidden: Tensor, ids: Tensor, out: tuple[Tensor, Tensor]
) -> None:
    """out: log_prob (n,), and (2, n): the largest logit and the logarithm of the sum."""
    log_prob, normalizer = out
    _launch(_log_prob_kernel, logits, head, hidden, ids, (log_prob, *normalizer))


def gradient_rows(
    logits: Tensor, head: Head, hidden: Tensor, ids: Tensor, given: tuple[Tensor, Tensor]
) -> None:
    """Overwrites the logits with the gradient of the log-probabilities, of which (n,) came;
    given: what log_prob_rows has made of the same logits, and that.
    """
    normalizer, grad = given
    _launch(_gradient_kernel, logits, head, hidden, ids, (*normalizer, grad))


@triton.jit
def _scale_kernel(out_ptr, x_ptr, factor_ptr, count, SAME: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    end = tl.where(SAME & (factor == 1.0), 0, count).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, end, step):
        place = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + place, mask=place < count).to(tl.float32)
        tl.store(out_ptr + place, (x * factor).to(out_ptr.dtype.element_ty), mask=place < count)


SCALED, PROGRAMS = 4096, 2048  # elements of a program at a time, and programs at most


def scaled(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor x, contiguous; factor: one float32. In place, where it is 1 nothing is read."""
    with torch.cuda.device_of(x):
        _scale_kernel[(min(PROGRAMS, triton.cdiv(x.numel(), SCALED)),)](
            out, x, factor, x.numel(), SAME=out is x, BLOCK=SCALED, num_warps=8
        )


def _launch(kernel, logits: Tensor, head: Head, hidden: Tensor, ids: Tensor, *given, **constants):
    block, warps = TILE
    block = min(block, max(vector() * 2, triton.next_power_of_2(logits.shape[1])))
    token = hidden, hidden.stride(0), ids
    softcap = 1.0 if head.softcap is None else head.softcap
    of_head = head.weight, head.weight.stride(0), head.bias, 1 / head.temperature, softcap
    constants |= {"SOFTCAP": head.softcap is not None, "BLOCK": block}
    with torch.cuda.device_of(logits):
        kernel[(len(logits),)](
            logits, logits.stride(0), token, of_head, *given, logits.shape[1], hidden.shape[1],
            **constants, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
