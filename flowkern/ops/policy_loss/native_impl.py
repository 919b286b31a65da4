"""The policy loss on the native kernels (csrc/policy_loss)."""

from __future__ import annotations

from torch import Tensor

from flowkern.ops._common import native_calls
from flowkern.ops._common.arguments import Noise


def forward(
    velocity, x_t, x_next, rows, advantage, row, old_velocity, old_log_prob, source: Noise | None,
    velocity_uncond, guidance_scale, velocity_ref, kl_coef, kl_value, step_weight,
    clip_low, clip_high, guard, reduction,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of PolicyLoss, and the slopes (B, 2)."""
    return native_calls.run(
        "policy_forward", velocity, x_t, x_next, rows, advantage, row, old_velocity, old_log_prob,
        *native_calls.noise(source), velocity_uncond, float(guidance_scale), velocity_ref,
        kl_value if kl_coef is None else kl_coef, step_weight, clip_low, clip_high,
        "guard" if guard else "sde", reduction, False,
    )[:-1]  # fmt: skip


def backward(
    grad, slopes, velocity, x_t, x_next, rows, row, old_velocity, source: Noise | None,
    velocity_uncond, guidance_scale, velocity_ref, guard, residual=None,
) -> Tensor:  # fmt: skip
    return native_calls.run(
        "policy_backward", grad, slopes, velocity, x_t, x_next, rows, row, old_velocity,
        *native_calls.noise(source), velocity_uncond, guidance_scale, velocity_ref, guard, residual,
    )  # fmt: skip
