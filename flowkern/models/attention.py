"""Attention whose gradient comes back as its output lies in memory.

torch keeps what cuDNN has made of an attention's backward pass, and 2.11 finds it again by shapes
and strides, but not by those of the gradient that comes in. In FLUX the same attention has a dense
one in some blocks and a slice of a wider one in others; then one's is taken for the other's, and
what comes of it is noise, or an illegal memory access (docs/gpu.md). Without cuDNN attention of
videos takes a third longer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dense_gradients", "plain"]

plain = F.scaled_dot_product_attention


class _Dense(torch.autograd.Function):
    """The same tensor; what its gradient is copied to, where it lies otherwise, lies as it does."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.stride = out.stride()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if grad.stride() == ctx.stride:
            return grad
        return torch.empty_strided(
            grad.shape, ctx.stride, dtype=grad.dtype, device=grad.device
        ).copy_(grad)


def _attention(*inputs: Any, **more: Any) -> Tensor:
    out = plain(*inputs, **more)
    return _Dense.apply(out) if out.is_cuda and out.requires_grad else out


def dense_gradients() -> None:
    """From now on, in this process, of `torch.nn.functional.scaled_dot_product_attention`: whoever
    calls it, as a backward pass that computes a block again does it by itself.
    """
    F.scaled_dot_product_attention = _attention
