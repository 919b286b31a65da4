"""Frozen linear layers in float8, with a gradient for what comes in; and blocks' layers quantized,
in float8 or as `small_weights` has them.

A weight is quantized once, for the way forward and, transposed, for the way back: together they
take what it took in bfloat16. What meets it is quantized as it comes, row by row, so that a row is
the same whatever else is in its batch. (torchao's float8 layers, made for weights that learn, keep
the weight, quantize it at each call, and in eager mode compute its gradient.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowkern import torch_private as private
from flowkern.models.small_weights import DTYPES, SmallLinear

__all__ = ["Float8Linear", "count", "frozen_bytes", "has_products", "quantize"]

SMALL = torch.float8_e4m3fn
LARGEST = torch.finfo(SMALL).max
UNIT = 16
"""Features come in multiples of it, or the products are not made."""
TRIED, ALLOWED = 64, 0.08
"""Rows of normal numbers by which a layer is tried, and how far off it may be, by norms: rounding
both factors to 3 bits errs by .04."""


class Float8Linear(nn.Module):
    """x (..., K) -> (..., N) in bfloat16, by a linear layer's weight (N, K) and bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, weight = linear.bias, linear.weight.detach()
        for name, each in (("forth", weight), ("back", weight.t().contiguous())):
            small, scale = quantized(each)
            self.register_buffer(name, small)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        out = Product.apply(rows, self.forth, self.forth_scale, self.back, self.back_scale)
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Product(torch.autograd.Function):
    """x (M, K) by a weight given as (N, K) for the way forward and (K, N) for the way back."""

    @staticmethod
    def forward(ctx, x, forth, forth_scale, back, back_scale):
        ctx.save_for_backward(back, back_scale)
        return product(x, forth, forth_scale)

    @staticmethod
    def backward(ctx, gradient):
        back, back_scale = ctx.saved_tensors
        return product(gradient, back, back_scale), None, None, None, None


def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(M, K) by a quantized (N, K) -> (M, N) in bfloat16."""
    small, scale_x = quantized(x.contiguous())
    if x.is_cpu:  # whose torch has no such product; its value is for tests
        return ((small.float() * scale_x) @ (weight.float() * scale).t()).to(torch.bfloat16)
    return private.scaled_product(small, weight.t(), scale_x, scale.t())


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) in float8, and what a row is to be multiplied by: (M, 1) float32."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(SMALL), scale


def has_products(device: torch.device) -> bool:
    """Does it multiply float8 by float8, with scales by rows?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize(
    blocks: Sequence[nn.Module], kind: str = "float8", device: torch.device | None = None
) -> int:
    """The blocks' frozen linear layers, in place; how many. Adapters stay, and in float8 norms' own
    layers, which see a row a sample: there is no time to gain. Of each size one is tried in float8
    before anything is changed.

    kind: float8, int8 or nf4. device: where a layer is quantized, and stays; None: where it is.
    Raises ValueError where there is none, for weights of another dtype or that are no numbers, and
    for a layer whose product or gradient in float8 is not the linear one's; ImportError for nf4
    without bitsandbytes.
    """
    is_float8 = kind == "float8"
    unit, dtypes = (UNIT, (torch.bfloat16,)) if is_float8 else (1, DTYPES)
    found = [
        (block, name)
        for block in blocks
        for name, layer in block.named_modules()
        if type(layer) is nn.Linear and not layer.weight.requires_grad
        if not (is_float8 and "norm" in name)
        if layer.in_features % unit == layer.out_features % unit == 0
    ]
    if not found:
        has = f"has features in multiples of {unit}" if is_float8 else "is there"
        raise ValueError(f"no frozen linear layer {has}")
    sizes: dict[torch.Size, str] = {}
    for block, name in found:
        layer = block.get_submodule(name)
        if layer.weight.dtype not in dtypes:
            dtype, *known = (str(d).removeprefix("torch.") for d in (layer.weight.dtype, *dtypes))
            raise ValueError(f"{name} is in {dtype}, expected {' or '.join(known)}")
        if is_float8 and layer.weight.shape not in sizes:
            _try(name, layer.to(device))
            sizes[layer.weight.shape] = name
    for block, name in found:  # one after the other: what it was is freed
        layer = block.get_submodule(name).to(device)
        try:
            made = Float8Linear(layer) if is_float8 else SmallLinear(layer, kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        block.set_submodule(name, made)
    return len(found)


def frozen_bytes(network: nn.Module) -> int:
    """Of all that is not trained: as much of a device's memory."""
    kept = {id(t): t for t in (*network.parameters(), *network.buffers()) if not t.requires_grad}
    return sum(t.nbytes for t in kept.values())


def count(network: nn.Module) -> int:
    """Its parameters, as many as before they were quantized."""
    found = {}
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, Float8Linear | SmallLinear):
            own = {"bias": own["bias"]} if "bias" in own else {}
            found[id(module)] = module.in_features * module.out_features
        found |= {id(p): p.numel() for p in own.values()}
    return sum(found.values())


def _try(name: str, linear: nn.Linear) -> None:
    """Both ways, against the linear layer."""
    device = linear.weight.device
    generator = torch.Generator(device).manual_seed(0)
    drawn = (linear.in_features, linear.out_features)
    x, gradient = (
        torch.randn(TRIED, n, device=device, generator=generator).bfloat16() for n in drawn
    )
    answers = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for layer in (linear, Float8Linear(linear)):
            given = x.clone().requires_grad_(True)
            out = layer(given) - (0 if linear.bias is None else linear.bias)
            answers.append((out.detach(), *torch.autograd.grad(out, given, gradient)))
    for what, right, close in zip(("products", "gradient"), *answers, strict=True):
        off = ((close - right).float().norm() / right.float().norm()).item()
        if not off <= ALLOWED:
            raise ValueError(f"{name}: its {what} in float8 are off by {off:.3g} of their norm")
