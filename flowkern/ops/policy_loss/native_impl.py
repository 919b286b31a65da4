"""The policy loss on the native kernels (csrc/policy_loss)."""

from __future__ import annotations

from torch import Tensor

from flowkern.ops._common import native_calls

from .inputs import PolicyInputs


def forward(i: PolicyInputs) -> tuple[Tensor, ...]:
    """The fields of PolicyLoss, and the slopes (B, 2)."""
    return native_calls.run("policy_forward", *i, False)[:-1]


def backward(
    grad: Tensor, slopes: Tensor, i: PolicyInputs, residual: Tensor | None = None
) -> Tensor:
    return native_calls.run("policy_backward", grad, slopes, *i, residual)
