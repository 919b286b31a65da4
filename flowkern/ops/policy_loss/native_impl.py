"""The policy loss on the native kernels (csrc/policy_loss)."""

from __future__ import annotations

from torch import Tensor

from flowkern.ops._common import native_calls

from .inputs import PolicyInputs


def forward(i: PolicyInputs, records: bool) -> tuple[Tensor | None, ...]:
    """The fields of PolicyLoss, the slopes (B, 2), and the residual or None."""
    return native_calls.run("policy_forward", *i, records)


def backward(grad: Tensor, slopes: Tensor, i: PolicyInputs, residual: Tensor | None) -> Tensor:
    return native_calls.run("policy_backward", grad, slopes, *i, residual)
