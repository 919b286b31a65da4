"""`formulas.py` once more, for CUDA devices: a table of edges in one launch, in float64.

What the kernel takes: (pointer, elements from edge to edge; 0: the same for all), or for a number
(None, two float32 that sum to it), as Triton rounds what it is given.
"""

from __future__ import annotations

import struct
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.schedules.coefficients import COLUMNS
from flowkern.schedules.formulas import TEMPERED

_BLOCK = 128


@triton.jit
def _load(input, edge, count):
    return tl.load(input[0] + edge * input[1], mask=edge < count, other=0.5).to(tl.float64)


@triton.jit
def _number(input, edge, count):
    if input[0] is not None:
        number = _load(input, edge, count)
    else:
        number = (edge * 0).to(tl.float64) + input[1] + input[2]
    return number


@triton.jit
def _step(s, n, level, second, KIND: tl.constexpr):
    dt = n - s
    rest = 1.0 - s
    image = 1.0 - n
    if KIND == "ode":
        a, b, std = s * 0.0 + 1.0, dt, s * 0.0
    elif KIND == "flow_sde" or KIND == "dance_sde":
        over = s
        if KIND == "flow_sde":
            over = tl.where(rest == 0.0, 1.0 - second, rest)
        h = dt * (0.5 * level * level) / over
        a, b, std = 1.0 + h, dt + h * rest, tl.sqrt(h * s * -2.0)
    else:
        if KIND == "cps":
            angle = level * 1.5707963267948966
            keep, std = n * tl.abs(tl.cos(angle)), n * tl.sin(angle)
        else:
            share = rest * n / (s * image)
            keep, std = n * share, n * tl.sqrt(1.0 - share * share)
        a, b = image + keep, keep * rest - image * s
    return a, b, std


@triton.jit
def _edges_kernel(
    table,  # out
    sigma, sigma_next, level, second, count,  # in
    KIND: tl.constexpr, TEMPERED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = edge < count
    s, n = _load(sigma, edge, count), _load(sigma_next, edge, count)
    s = tl.where(tl.abs(s - 1.0) <= 1e-5, 1.0, s)
    star = n
    if second is not None:
        star = _number(second, edge, count)
    a, b, std = _step(s, n, _number(level, edge, count), star, KIND)
    zero = s * 0.0
    if TEMPERED:
        k, c = zero + 1.0, zero
    else:
        safe = tl.where(std == 0.0, 1.0, std)
        k = tl.where(std == 0.0, 0.0, 0.5 / (safe * safe))
        c = tl.where(std == 0.0, 0.0, -0.9189385332046727 - tl.log(safe))
    row = table + edge * COLUMNS
    tl.store(row, a.to(tl.float32), mask=inside)
    tl.store(row + 1, b.to(tl.float32), mask=inside)
    tl.store(row + 2, std.to(tl.float32), mask=inside)
    tl.store(row + 3, k.to(tl.float32), mask=inside)
    tl.store(row + 4, c.to(tl.float32), mask=inside)
    for column in tl.static_range(5, COLUMNS - 1):
        tl.store(row + column, zero.to(tl.float32), mask=inside)
    tl.store(row + COLUMNS - 1, s.to(tl.float32), mask=inside)


def rows(
    kind: str,
    size: int,
    sigma: Tensor,
    sigma_next: Tensor,
    level: Tensor | float,
    second: Tensor | float | None,
) -> Tensor:
    """The table of `size` edges; of one (9,)."""
    columns = len(COLUMNS)
    table = torch.empty(
        columns if size == 1 else (size, columns), dtype=torch.float32, device=sigma.device
    )
    if size:
        elsewhere = sigma.is_cuda and sigma.get_device() != torch.cuda.current_device()
        with torch.cuda.device_of(sigma) if elsewhere else nullcontext():
            _edges_kernel[(triton.cdiv(size, _BLOCK),)](
                table, *map(_given, (sigma, sigma_next, level, second)), size,
                KIND=kind, TEMPERED=kind in TEMPERED, COLUMNS=columns, BLOCK=_BLOCK,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return table


def _given(x: Tensor | float | None) -> tuple | None:
    if isinstance(x, Tensor):
        return x.resolve_neg(), x.stride(0) if x.numel() > 1 else 0
    if x is None:
        return None
    high = struct.unpack("f", struct.pack("f", x))[0]
    return None, high, x - high
