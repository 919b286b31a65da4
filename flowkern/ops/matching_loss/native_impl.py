"""The matching losses on the native kernels (csrc/matching_loss)."""

from __future__ import annotations

from torch import Tensor

from flowkern.ops._common import native_calls
from flowkern.ops._common.arguments import Noise

from .reference import WEIGHTINGS


def forward(
    velocity, x0, sigma, advantage, row, source: Noise, nft: bool, weighting: int,
    old_velocity, velocity_ref, velocity_ema,
    ref_coef: float, ema_coef: float, clip_low: float, clip_high: float, reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of MatchingLoss, and the slopes (B, 4)."""
    return native_calls.run(
        "matching_forward", velocity, x0, sigma, advantage, row, *native_calls.noise(source),
        "nft" if nft else "awm", WEIGHTINGS[weighting], old_velocity, velocity_ref, velocity_ema,
        ref_coef, ema_coef, clip_low, clip_high, reduction, False,
    )[:-1]  # fmt: skip


def backward(
    grad, slopes, velocity, x0, sigma, row, source: Noise, nft: bool,
    old_velocity, velocity_ref, velocity_ema, residual=None,
) -> Tensor:  # fmt: skip
    return native_calls.run(
        "matching_backward", grad, slopes, velocity, x0, row, *native_calls.noise(source),
        old_velocity, velocity_ref, velocity_ema, residual,
    )  # fmt: skip


def add_noise(x0: Tensor, sigma: Tensor, source: Noise) -> Tensor:
    return native_calls.run("add_noise", x0, sigma, *native_calls.noise(source))
