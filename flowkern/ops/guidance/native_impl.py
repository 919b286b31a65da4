"""Rescaled guidance on the native CPU kernels (csrc/guidance)."""

from __future__ import annotations

from torch import Tensor

from flowkern.ops._common import native_calls

from .inputs import GuidanceInputs


def forward(i: GuidanceInputs) -> Tensor:
    return native_calls.run("rescaled_guidance", *i)


def backward(i: GuidanceInputs, grad: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
    return native_calls.run("rescaled_guidance_backward", *i, grad, both)
