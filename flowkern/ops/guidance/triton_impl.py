"""Rescaled guidance in Triton: one launch forward, one back.

A program takes neighboring tokens of a row: all their elements at once, where that is one tile,
else twice, for the sums and, from the cache, for the results. So a token's bits depend on the token
alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkern.ops._common.rows_triton import launch_programs, packed_latent

from .inputs import GuidanceInputs

# Latents as in rows_triton; sizes: channels, rows, width; HIGH, WIDE: rows and columns of a token.
# A tile is (RUNS, BLOCK, LANES): rows of the channels of BLOCK tokens, by columns of a token.


@triton.jit
def _column(
    sizes, HIGH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    """Sample, row of tokens, and (1, BLOCK, LANES) columns with whether there are such."""
    _, rows, width = sizes
    groups, tokens = rows // HIGH, width // WIDE
    tiles = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0)
    token = ((program % tiles) * BLOCK + tl.arange(0, BLOCK))[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    sample = (program // tiles // groups).to(tl.int64)
    inside = token < tokens
    if LANES != WIDE:
        inside = inside & (lane < WIDE)
    return sample, program // tiles % groups, token * WIDE + lane, inside


@triton.jit
def _place(begin, group, column, inside, sizes, HIGH: tl.constexpr, RUNS: tl.constexpr):
    """Where in a sample the elements of a tile are, and whether there are any."""
    channels, rows, width = sizes
    run = (begin + tl.arange(0, RUNS))[:, None, None]
    row = run // HIGH * rows + group * HIGH + run % HIGH
    return row * width + column, inside & (run < channels * HIGH)


@triton.jit
def _load(latent, sample, place, inside):
    return tl.load(latent[0] + sample * latent[1] + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(latent, sample, place, inside, value):
    pointer = latent[0] + sample * latent[1] + place
    tl.store(pointer, value.to(latent[0].dtype.element_ty), mask=inside)


@triton.jit
def _both(velocity, uncond, guidance_scale, sample, place, inside):
    v = _load(velocity, sample, place, inside)
    u = _load(uncond, sample, place, inside)
    return v, u + guidance_scale * (v - u)


@triton.jit
def _sums(x):
    """(1, BLOCK, 1) in float64, of the tokens of a tile."""
    return tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None].to(tl.float64)


@triton.jit
def _ratio(of_velocity, of_guided):
    return tl.sqrt_rn((of_velocity / of_guided).to(tl.float32))


@triton.jit
def _forward_kernel(
    out,  # out
    velocity, uncond, guidance_scale, sizes,  # in
    HIGH: tl.constexpr, WIDE: tl.constexpr,
    RUNS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    sample, group, column, exists = _column(sizes, HIGH, WIDE, BLOCK, LANES)
    if ONCE:
        place, inside = _place(0, group, column, exists, sizes, HIGH, RUNS)
        v, g = _both(velocity, uncond, guidance_scale, sample, place, inside)
        _store(out, sample, place, inside, g * _ratio(_sums(v * v), _sums(g * g)))
    else:
        of_velocity = tl.zeros((1, BLOCK, 1), tl.float64)
        of_guided = tl.zeros((1, BLOCK, 1), tl.float64)
        for begin in range(0, sizes[0] * HIGH, RUNS):
            place, inside = _place(begin, group, column, exists, sizes, HIGH, RUNS)
            v, g = _both(velocity, uncond, guidance_scale, sample, place, inside)
            of_velocity += _sums(v * v)
            of_guided += _sums(g * g)
        ratio = _ratio(of_velocity, of_guided)
        for begin in range(0, sizes[0] * HIGH, RUNS):
            place, inside = _place(begin, group, column, exists, sizes, HIGH, RUNS)
            _, g = _both(velocity, uncond, guidance_scale, sample, place, inside)
            _store(out, sample, place, inside, g * ratio)


@triton.jit
def _backward_kernel(
    grad_velocity, grad_uncond,  # out
    grad, velocity, uncond, guidance_scale, sizes,  # in
    HIGH: tl.constexpr, WIDE: tl.constexpr,
    RUNS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    sample, group, column, exists = _column(sizes, HIGH, WIDE, BLOCK, LANES)
    out = grad_velocity, grad_uncond
    if ONCE:
        place, inside = _place(0, group, column, exists, sizes, HIGH, RUNS)
        v, g = _both(velocity, uncond, guidance_scale, sample, place, inside)
        d = _load(grad, sample, place, inside)
        of_token = _of_token(_sums(v * v), _sums(g * g), _sums(g * d))
        _store_gradients(out, sample, place, inside, v, g, d, guidance_scale, of_token)
    else:
        of_velocity = tl.zeros((1, BLOCK, 1), tl.float64)
        of_guided = tl.zeros((1, BLOCK, 1), tl.float64)
        with_grad = tl.zeros((1, BLOCK, 1), tl.float64)
        for begin in range(0, sizes[0] * HIGH, RUNS):
            place, inside = _place(begin, group, column, exists, sizes, HIGH, RUNS)
            v, g = _both(velocity, uncond, guidance_scale, sample, place, inside)
            of_velocity += _sums(v * v)
            of_guided += _sums(g * g)
            with_grad += _sums(g * _load(grad, sample, place, inside))
        of_token = _of_token(of_velocity, of_guided, with_grad)
        for begin in range(0, sizes[0] * HIGH, RUNS):
            place, inside = _place(begin, group, column, exists, sizes, HIGH, RUNS)
            v, g = _both(velocity, uncond, guidance_scale, sample, place, inside)
            d = _load(grad, sample, place, inside)
            _store_gradients(out, sample, place, inside, v, g, d, guidance_scale, of_token)


@triton.jit
def _of_token(of_velocity, of_guided, with_grad):
    ratio = _ratio(of_velocity, of_guided)
    along = (with_grad / of_guided).to(tl.float32)
    # |velocity| is not smooth at 0: 0, as torch has it.
    return ratio, along, tl.where(ratio > 0, tl.div_rn(along, ratio), 0.0)


@triton.jit
def _store_gradients(out, sample, place, inside, v, g, grad, guidance_scale, of_token):
    ratio, along, of_length = of_token
    in_guided = ratio * (grad - along * g)
    _store(out[0], sample, place, inside, guidance_scale * in_guided + of_length * v)
    if out[1] is not None:
        _store(out[1], sample, place, inside, (1.0 - guidance_scale) * in_guided)


def forward(i: GuidanceInputs) -> Tensor:
    out = torch.empty(i.velocity.shape, dtype=torch.float32, device=i.velocity.device)
    _launch(_forward_kernel, i, packed_latent(out))
    return out


def backward(i: GuidanceInputs, grad: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in i[: 1 + both]]
    out += [None] * (not both)
    _launch(_backward_kernel, i, *map(packed_latent, out), packed_latent(grad))
    return tuple(out)


TILE, COLUMNS = 2048, 64  # elements of a tile, and of a run of it, at most: lines of memory


def _launch(kernel, i: GuidanceInputs, *arguments) -> None:
    channels, rows, width = i.sizes
    groups, tokens = rows // i.patch_rows, width // i.patch_width
    lanes = triton.next_power_of_2(i.patch_width)
    block = min(triton.next_power_of_2(tokens), max(1, COLUMNS // lanes))
    runs = triton.next_power_of_2(channels * i.patch_rows)
    runs = min(runs, max(1, TILE // (block * lanes)))
    launch_programs(
        kernel, i.velocity, len(i.velocity) * groups * triton.cdiv(tokens, block),
        *arguments, packed_latent(i.velocity), packed_latent(i.velocity_uncond),
        float(i.guidance_scale), (channels, rows, width),
        HIGH=i.patch_rows, WIDE=i.patch_width, RUNS=runs, BLOCK=block, LANES=lanes,
        ONCE=runs >= channels * i.patch_rows, num_warps=4,
    )  # fmt: skip
