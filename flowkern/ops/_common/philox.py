"""Noise: Philox-4x32-10 and its transform to normals in plain torch, and the public verb.

The same IEEE float32 operations in the same order as csrc/common/philox.h and philox_triton.py, so
the normals agree to the bit on every backend. Layout: docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native_calls
from .arguments import STREAMS, Noise, check_key
from .dispatch import (
    Impl,
    choose,
    is_tracing,
    is_transformed,
    lazily,
    native_why_not,
    no_objection,
    triton_why_not,
)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOG_POLYNOMIAL = (
    -1.063610911e-01, 1.637329757e-01, -1.711735427e-01, 1.987408698e-01, -2.498183101e-01,
    3.333608806e-01, -0.5,
)  # fmt: skip
SINE_POLYNOMIAL = (-1.949563593e-04, 8.331978694e-03, -1.666665077e-01)
COSINE_POLYNOMIAL = (-1.365244971e-03, 4.166127741e-02, -0.5, 1.0)


def philox_4x32_10(counter: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four int64 tensors of 32-bit words -> four."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ key0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ key1,
            p0 & _MASK,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK, (key1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def box_muller(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two 32-bit words (int64 tensors)."""
    # torch's float32 sqrt is not always correctly rounded (MKL); through float64 it is.
    radius = torch.sqrt((-2.0 * _log_unit((radius_bits >> 1).float() + 0.5)).double()).float()
    quadrant = (angle_bits + 0x20000000 & _MASK) >> 30
    shifted = angle_bits << 2 & _MASK
    y = (shifted - (shifted >> 31 << 32)).float() * 3.657295198e-10  # 2 pi / 2^34: within pi / 4
    y2 = y * y
    sine = fused(_polynomial(SINE_POLYNOMIAL, y2), y2 * y, y)
    cosine = _polynomial(COSINE_POLYNOMIAL, y2)
    swap = quadrant & 1 == 1
    c = torch.where(swap, sine, cosine) * (1 - (quadrant + 1 & 2)).float()
    s = torch.where(swap, cosine, sine) * (1 - (quadrant & 2)).float()
    return radius * c, radius * s


def _log_unit(n: Tensor) -> Tensor:
    """ln(n 2^-31) for n in [1/2, 2^31]: n = 2^(31 + exponent) (1 + t), 1 + t about 1."""
    bits = n.view(torch.int32) - 0x4EB504F3  # bits of 2^31 sqrt(1/2)
    exponent = (bits >> 23).float()
    t = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    return fused(exponent, 0.693147180559945, fused(_polynomial(LOG_POLYNOMIAL, t), t * t, t))


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    p = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        p = fused(p, x, coefficient)
    return p


def fused(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c of float32 values, rounded once, as a fused multiply-add does.

    In float64 the product is exact; the sum is rounded to odd there (its last bit is set where
    anything was cut off), so that rounding it to float32 is rounding the exact value.
    """
    c = torch.as_tensor(c, dtype=torch.float32, device=a.device).double()
    product = a.double() * torch.as_tensor(b, dtype=torch.float32, device=a.device).double()
    total = product + c
    part = total - product
    cut = (product - (total - part)) + (c - part)  # what the sum left out, exactly
    bits = total.view(torch.int64)
    toward = torch.where((cut > 0) == (total > 0), 1, -1)  # on the side of what was cut
    odd = torch.where((cut != 0) & (bits & 1 == 0), bits + toward, bits)
    return odd.view(torch.float64).float()


def reference_normal(shape: Sequence[int], key: Noise, stream: int, device: torch.device) -> Tensor:
    """(B, *D) float32 normals."""
    batch, size = shape[0], math.prod(shape[1:])
    block = torch.arange((size + 3) // 4, device=device)
    step = key.step if key.step is not None else torch.full((batch,), key.step_value, device=device)
    zero = torch.zeros_like(block)
    word = (stream << 28 | step & 0x0FFFFFFF)[:, None] + zero
    low, high = (
        (key.sample_id & _MASK)[:, None] + zero,
        (key.sample_id >> 32 & _MASK)[:, None] + zero,
    )
    r0, r1, r2, r3 = philox_4x32_10((block + torch.zeros_like(low), word, low, high), key.seed)
    normals = torch.stack([*box_muller(r0, r1), *box_muller(r2, r3)], dim=-1)
    return normals.flatten(1)[:, :size].reshape(tuple(shape))


def _native_normal(shape: Sequence[int], key: Noise, stream: int, device: torch.device) -> Tensor:
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    _, *keyed = native_calls.noise(key)
    return native_calls.run("fill_philox", out, *keyed, stream)


_IMPLS = (
    Impl("native", _native_normal, native_why_not),
    Impl("triton", lazily("flowkern.ops._common.philox_triton", "triton_normal"), triton_why_not),
    Impl("reference", reference_normal, no_objection),
)


@torch.library.custom_op("flowkern::philox_normal", mutates_args=())
def _normal_op(
    shape: Sequence[int],
    seed: int,
    sample_id: Tensor,
    step: Tensor | None,
    step_value: int,
    stream: int,
    backend: str | None,
) -> Tensor:
    key = Noise(None, seed, sample_id, step, step_value)
    impl = choose(_IMPLS, sample_id.device, torch.float32, backend)
    return impl.call(shape, key, stream, sample_id.device)


@_normal_op.register_fake
def _(shape, seed, sample_id, *_) -> Tensor:
    return sample_id.new_empty(shape, dtype=torch.float32)


def philox_normal(
    shape: Sequence[int],
    seed: int,
    sample_id: Tensor,
    step: int | Tensor,
    stream: str = "step",
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normals that follow from (seed, stream, step, sample_id, element) alone.

    It is the noise that the kernels draw, the same bits on every backend.
    Source: Philox-4x32-10 (Salmon et al., SC 2011) and Box-Muller; docs/numerics.md.

    Args:
        shape: (B, *D).
        seed: 64 bits.
        sample_id: (B,) integers: global ids (iteration, prompt, root, branch), never an index in
            the batch.
        step: int or (B,) integers, 0 <= step < 2**28.
        stream: "init" | "step" | "match".
        device: that of sample_id by default.

    Returns:
        (B, *D) float32.
    """
    is_shape = isinstance(shape, Sequence) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not is_shape or len(shape) < 2:
        raise ValueError(f"shape: expected (B, *D) with at least two dimensions, got {shape!r}")
    if stream not in STREAMS:
        raise ValueError(f"stream: expected one of {tuple(STREAMS)}, got {stream!r}")
    if device is None:
        device = sample_id.device if isinstance(sample_id, Tensor) else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    key = check_key(seed, sample_id, step, shape[0], device)
    number = STREAMS[stream]
    transformed = is_transformed()
    if is_tracing(key.sample_id, key.step) and not transformed:
        return _normal_op(
            list(shape), key.seed, key.sample_id, key.step, key.step_value, number, backend
        )
    impl = choose(_IMPLS, device, torch.float32, backend, transformed)
    return impl.call(shape, key, number, device)
