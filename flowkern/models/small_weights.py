"""Frozen linear layers whose weight is kept in 8 or 4 bits, and made whole at each call.

It is made again for the way back, so that nothing of its size is kept in between; both ways are
operators, because a compiler that sees into them makes it once and keeps it. What samples and what
learns multiply by the same numbers. (An int8 tensor of torchao and an nf4 layer of bitsandbytes do
otherwise: docs/log.md.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["DTYPES", "SmallLinear"]

DTYPES = torch.float32, torch.float16, torch.bfloat16
LEVELS = 127
"""Of int8, on either side of 0."""
BLOCK = 64
"""Weights that have a scale in nf4: bitsandbytes' own, and QLoRA's (arXiv 2305.14314)."""


class SmallLinear(nn.Module):
    """x (..., K) -> (..., N) by a linear layer's weight (N, K) and bias, in the weight's dtype, or
    autocast's.

    int8: with a float32 scale for each of the N rows. nf4: with one for every 64 weights; takes
    bitsandbytes. The weight is in one of DTYPES. Raises ValueError where it is not finite,
    ImportError without bitsandbytes.
    """

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        weight, self.bias, self.kind = layer.weight.detach(), layer.bias, kind
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = weight.dtype
        if not weight.isfinite().all():
            raise ValueError("weights are not finite")
        small, scale = _kept(kind, weight)
        # Parameters, so that what shards a network's weights shards these.
        self.small = nn.Parameter(small, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        device, dtype = x.device.type, self.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        shape = [self.out_features, self.in_features]
        return _Product.apply(x.to(dtype), self.small, self.scale, self.bias, self.kind, shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, small, scale, bias, kind, shape):
        ctx.save_for_backward(small, scale)
        ctx.kind, ctx.shape = kind, shape
        return _product(x, small, scale, bias, kind, shape)

    @staticmethod
    def backward(ctx, gradient):
        small, scale = ctx.saved_tensors
        return _gradient(gradient, small, scale, ctx.kind, ctx.shape), *[None] * 5


@torch.library.custom_op("flowkern::small_linear", mutates_args=())
def _product(
    x: Tensor, small: Tensor, scale: Tensor, bias: Tensor | None, kind: str, shape: list[int]
) -> Tensor:
    bias = bias if bias is None else bias.to(x.dtype)
    return linear(x, _whole(small, scale, kind, shape, x.dtype), bias)


@_product.register_fake
def _(x, small, scale, bias, kind, shape):
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("flowkern::small_linear_backward", mutates_args=())
def _gradient(
    gradient: Tensor, small: Tensor, scale: Tensor, kind: str, shape: list[int]
) -> Tensor:
    return gradient @ _whole(small, scale, kind, shape, gradient.dtype)


@_gradient.register_fake
def _(gradient, small, scale, kind, shape):
    return gradient.new_empty(*gradient.shape[:-1], shape[1])


def _kept(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept of a weight (N, K), and its scales."""
    if kind == "nf4":
        from bitsandbytes import functional

        small, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
        return small, state.absmax
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True) / LEVELS
    scale.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros
    return (weight / scale).round_().to(torch.int8), scale


def _whole(small: Tensor, scale: Tensor, kind: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The weight (N, K) again."""
    if kind == "nf4":
        from bitsandbytes import functional

        state = functional.QuantState(
            scale, torch.Size(shape), blocksize=BLOCK, quant_type=kind, dtype=dtype
        )
        return functional.dequantize_4bit(small, state)
    return torch.mul(small, scale, out=torch.empty(shape, dtype=dtype, device=small.device))
