"""Noise in Triton: the operations of csrc/common/philox.h in their order, so with the same bits.

Compile and launch whatever uses these with `enable_fp_fusion=False`: a contracted multiply-add
rounds once where the other backends round twice. Layout: docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Noise
from .rows_triton import cut, launch, load, packed_latent


@triton.jit
def log_unit(n):
    """ln(n 2^-31) for n in [1/2, 2^31]: n = 2^(31 + exponent) (1 + t), 1 + t about 1."""
    bits = n.to(tl.int32, bitcast=True) - 0x4EB504F3  # bits of 2^31 sqrt(1/2)
    exponent = (bits >> 23).to(tl.float32)
    t = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(t, -1.063610911e-01, 1.637329757e-01)
    p = tl.fma(p, t, -1.711735427e-01)
    p = tl.fma(p, t, 1.987408698e-01)
    p = tl.fma(p, t, -2.498183101e-01)
    p = tl.fma(p, t, 3.333608806e-01)
    p = tl.fma(tl.fma(p, t, -0.5), t * t, t)
    return tl.fma(exponent, 0.693147180559945, p)


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two normals from two uint32 words: 31 bits of radius, 32 of angle, cut to a quarter turn."""
    radius = tl.sqrt_rn(-2.0 * log_unit((radius_bits >> 1).to(tl.float32) + 0.5))
    quadrant = ((angle_bits >> 29) + 1) >> 1
    y = (angle_bits << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198e-10  # 2 pi / 2^34
    y2 = y * y
    sine = tl.fma(y2, -1.949563593e-04, 8.331978694e-03)
    sine = tl.fma(tl.fma(sine, y2, -1.666665077e-01), y2 * y, y)
    cosine = tl.fma(y2, -1.365244971e-03, 4.166127741e-02)
    cosine = tl.fma(tl.fma(cosine, y2, -0.5), y2, 1.0)
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
def noise_of(source, sample, first, count, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """The noise of a chunk: read where it is given, else drawn. `source` as of packed_noise."""
    given, sample_id_ptr, step_ptr, step_value, key_low, key_high = source
    if given is not None:
        noise = load(given, sample, first, count, BLOCK)
    else:
        step = step_value if step_ptr is None else tl.load(step_ptr + sample)
        word, sample_id = counter_word(step, STREAM), tl.load(sample_id_ptr + sample)
        noise = normals(first, word, sample_id, key_low, key_high, BLOCK)
    return noise


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
    return (seed & 0xFFFFFFFF ^ 2**31) - 2**31, (seed >> 32 & 0xFFFFFFFF ^ 2**31) - 2**31


def packed_noise(source: Noise) -> tuple:
    """(given, sample_id, step, step_value, key_low, key_high) of `noise_of`.

    Kernels take them one by one and do not specialize the integers.
    """
    key = source.sample_id, source.step, source.step_value
    return packed_latent(source.given), *key, *key_halves(source.seed)


def triton_normal(shape: Sequence[int], key: Noise, stream: int, device: torch.device) -> Tensor:
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    if out.numel():
        launch(
            _fill_kernel, out, cut(out),
            out, key.sample_id, key.step, key.step_value, *key_halves(key.seed), STREAM=stream,
        )  # fmt: skip
    return out
