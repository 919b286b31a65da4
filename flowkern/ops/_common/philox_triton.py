"""Noise in Triton: the operations of csrc/common/philox.h in their order, so with the same bits.

Compile and launch whatever uses these with `enable_fp_fusion=False`: a contracted multiply-add
rounds once where the other backends round twice. Layout: docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Noise
from .dispatch import interpreting


@triton.jit
def log_unit(u):
    """ln(u) for u in [2^-32, 1]: u = 2^exponent (1 + t) with 1 + t in [sqrt(1/2), sqrt(2))."""
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # bits of sqrt(1/2)
    exponent = (bits >> 23).to(tl.float32)
    t = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = 8.700359947e-02 * t + -1.426747632e-01
    p = p * t + 1.491478702e-01
    p = p * t + -1.657758601e-01
    p = p * t + 1.996306229e-01
    p = p * t + -2.500133702e-01
    p = p * t + 3.333391077e-01
    return exponent * 0.693147180559945 + ((p * t - 0.5) * (t * t) + t)


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two normals from two uint32 words: 31 bits of radius, 32 of angle, cut to a quarter turn."""
    u = (radius_bits >> 1).to(tl.float32) * 4.656612873077393e-10 + 2.328306436538696e-10
    radius = tl.sqrt_rn(-2.0 * log_unit(u))
    quadrant = ((angle_bits >> 29) + 1) >> 1
    y = (angle_bits << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198e-10  # 2 pi / 2^34
    y2 = y * y
    sine = ((-1.951528210e-04 * y2 + 8.332160752e-03) * y2 + -1.666665461e-01) * y2 * y + y
    cosine = (2.443844968e-05 * y2 + -1.388736750e-03) * y2 + 4.166664687e-02
    cosine = cosine * y2 * y2 - 0.5 * y2 + 1.0
    swap = (quadrant & 1) == 1
    # Signs as bits: a product with -1 costs more, and Triton's unary minus turns -0 into +0.
    c = tl.where(swap, sine, cosine).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    s = tl.where(swap, cosine, sine).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    return radius * c.to(tl.float32, bitcast=True), radius * s.to(tl.float32, bitcast=True)


@triton.jit
def normals(first, word, sample_id, key_low, key_high, BLOCK: tl.constexpr):
    """(BLOCK,) normals of the elements from `first` on, a multiple of 4; `word` as `counter_word`.

    One counter serves four neighbors, which stay in the thread that drew them where it holds four
    (float32); for 16-bit latents, eight to a thread, they pass through shared memory.
    """
    counter = (first // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = tl.zeros_like(counter)
    low = zero + (sample_id & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    x, y, z, w = tl.philox_impl(
        counter, zero + word, low, high,
        key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True),
    )  # fmt: skip
    n0, n1 = box_muller(x, y)
    n2, n3 = box_muller(z, w)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def counter_word(step, STREAM: tl.constexpr):
    """The second word of the counter: the stream in the top four bits, the step below."""
    return (STREAM << 28) | (step & 0x0FFFFFFF).to(tl.uint32)


@triton.jit
def program_place(size, BLOCK: tl.constexpr):
    """(sample, chunk, chunks per sample) in a grid of batch x chunks, flat: neither has a limit."""
    chunks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    return (program // chunks).to(tl.int64), (program % chunks).to(tl.int64), chunks


@triton.jit(do_not_specialize=["step_value", "key_low", "key_high"])
def _fill_kernel(
    out_ptr,  # (B, size) float32
    sample_id_ptr, step_ptr, step_value, key_low, key_high, size,
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, chunk, _ = program_place(size, BLOCK)
    first = chunk * BLOCK
    step = step_value if step_ptr is None else tl.load(step_ptr + sample)
    word = counter_word(step, STREAM)
    value = normals(first, word, tl.load(sample_id_ptr + sample), key_low, key_high, BLOCK)
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + sample * size + first + lane, value, mask=lane < size - first)


def key_halves(seed: int) -> tuple[int, int]:
    """The 64 bits of a seed as two int32, so that one kernel serves every seed."""
    return tuple((seed >> shift & 0xFFFFFFFF ^ 2**31) - 2**31 for shift in (0, 32))


def triton_normal(shape: Sequence[int], key: Noise, stream: int, device: torch.device) -> Tensor:
    out = torch.empty(tuple(shape), device=device)
    batch, size = shape[0], math.prod(shape[1:])
    if out.numel():
        block = 2**16 if interpreting() else 1024
        with torch.cuda.device_of(out):
            _fill_kernel[(batch * triton.cdiv(size, block),)](
                out, key.sample_id, key.step, key.step_value, *key_halves(key.seed), size,
                STREAM=stream, BLOCK=block, enable_fp_fusion=False,
            )  # fmt: skip
    return out
