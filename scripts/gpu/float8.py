"""Frozen linear layers in float8 with a gradient for what comes in: measured, not yet a feature.

A weight is quantized once, for the way forward and, transposed, for the way back: together they
take what it took in bfloat16. What meets it is quantized as it comes: by rows, each with a scale
of its own, or as a whole. (torchao's float8 layers, made for weights that learn, keep the weight,
quantize it at each call, and in eager mode compute its gradient.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL = torch.float8_e4m3fn
LARGEST = torch.finfo(SMALL).max


class Float8Linear(nn.Module):
    """x (..., K) -> (..., N) in bfloat16, by a linear layer's weight (N, K) and bias."""

    def __init__(self, linear: nn.Linear, by_rows: bool):
        super().__init__()
        self.by_rows, self.bias = by_rows, linear.bias
        weight = linear.weight.detach()
        for name, each in (("forth", weight), ("back", weight.t().contiguous())):
            small, scale = quantized(each, by_rows)
            self.register_buffer(name, small)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        out = Product.apply(
            rows, self.forth, self.forth_scale, self.back, self.back_scale, self.by_rows
        ).reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Product(torch.autograd.Function):
    """x (M, K) by a weight given as (N, K) for the way forward and (K, N) for the way back."""

    @staticmethod
    def forward(ctx, x, forth, forth_scale, back, back_scale, by_rows):
        ctx.save_for_backward(back, back_scale)
        ctx.by_rows = by_rows
        return product(x, forth, forth_scale, by_rows)

    @staticmethod
    def backward(ctx, gradient):
        back, back_scale = ctx.saved_tensors
        return product(gradient, back, back_scale, ctx.by_rows), None, None, None, None, None


def product(x: Tensor, weight: Tensor, scale: Tensor, by_rows: bool) -> Tensor:
    """(M, K) by a quantized (N, K) -> (M, N) in bfloat16."""
    small, scale_x = quantized(x.contiguous(), by_rows)
    if by_rows and x.is_cpu:  # a CPU's torch has no such product; a rehearsal needs its value
        return ((small.float() * scale_x) @ (weight.float() * scale).t()).to(torch.bfloat16)
    return torch._scaled_mm(
        small, weight.t(), scale_x, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def quantized(x: Tensor, by_rows: bool) -> tuple[Tensor, Tensor]:
    """x (M, K) in float8 and what it is to be multiplied by: float32, (M, 1) or of no dimension."""
    largest = x.abs().amax(-1, keepdim=True) if by_rows else x.abs().amax()
    scale = largest.float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(SMALL), scale


def quantize(blocks: list[nn.Module], by_rows: bool) -> int:
    """The blocks' frozen linear layers, in place; how many. Norms' own layers see a row a sample
    and stay, as do adapters.
    """
    found = [
        (block, name)
        for block in blocks
        for name, layer in block.named_modules()
        if type(layer) is nn.Linear and "norm" not in name and not layer.weight.requires_grad
    ]
    for block, name in found:
        block.set_submodule(name, Float8Linear(block.get_submodule(name), by_rows))
    return len(found)
