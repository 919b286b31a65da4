"""Rescaled guidance in plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common.arguments import compute_dtype
from flowkern.ops._common.rows import guided

from .inputs import GuidanceInputs

OF_A_TOKEN = (1, 3, 5)  # of the dimensions of `_by_tokens`


def forward(i: GuidanceInputs) -> Tensor:
    """Differentiable in both velocities. Sums are float64's: torch's of float32 depend on the
    shape, and a sample must not depend on its batch."""
    dtype = compute_dtype(i.velocity, i.velocity_uncond)
    velocity = _by_tokens(i.velocity.to(dtype), i)
    together = _by_tokens(guided(i.velocity, i.velocity_uncond, i.guidance_scale, dtype), i)
    return (together * (_length(velocity) / _length(together)).to(dtype)).reshape(i.velocity.shape)


def backward(i: GuidanceInputs, grad: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of both velocities, or of the first, by hand, since it runs inside an op; the
    tests hold it to autograd through `forward`."""
    dtype, w = grad.dtype, i.guidance_scale
    velocity = _by_tokens(i.velocity.to(dtype), i)
    together = _by_tokens(guided(i.velocity, i.velocity_uncond, w, dtype), i)
    grad = _by_tokens(grad, i)
    ratio = (_length(velocity) / _length(together)).to(dtype)
    along, square = (
        (together.double() * x.double()).sum(OF_A_TOKEN, keepdim=True) for x in (grad, together)
    )
    along = (along / square).to(dtype)
    in_guided = ratio * (grad - along * together)
    in_length = torch.where(ratio > 0, along / ratio, 0) * velocity
    found = (w * in_guided + in_length).reshape(i.velocity.shape).to(i.velocity.dtype)
    if not both:
        return found, None
    return found, ((1 - w) * in_guided).reshape(found.shape).to(i.velocity_uncond.dtype)


def _by_tokens(x: Tensor, i: GuidanceInputs) -> Tensor:
    """(B, C, rows of tokens, rows of one, tokens of a row, columns of one)"""
    channels, rows, width = i.sizes
    high, wide = i.patch_rows, i.patch_width
    return x.reshape(len(x), channels, rows // high, high, width // wide, wide)


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=OF_A_TOKEN, keepdim=True, dtype=torch.float64)
