"""The matching losses on the native kernels (csrc/matching_loss)."""

from __future__ import annotations

from torch import Tensor

from flowkern.ops._common import native_calls
from flowkern.ops._common.arguments import Noise

from .inputs import MatchingInputs


def forward(i: MatchingInputs, records: bool) -> tuple[Tensor | None, ...]:
    """The fields of MatchingLoss, the slopes (B, 4), and the residual or None."""
    return native_calls.run("matching_forward", *i, records)


def backward(grad: Tensor, slopes: Tensor, i: MatchingInputs, residual: Tensor | None) -> Tensor:
    return native_calls.run("matching_backward", grad, slopes, *i, residual)


def add_noise(x0: Tensor, sigma: Tensor, source: Noise) -> Tensor:
    return native_calls.run("add_noise", x0, sigma, *native_calls.noise(source))
