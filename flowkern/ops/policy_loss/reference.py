"""The policy loss in plain torch: the truth, differentiated by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS, Noise
from flowkern.ops._common.philox import reference_normal
from flowkern.schedules import COLUMNS


def policy_loss(
    velocity, x_t, x_next, rows, advantage, row, old_velocity, old_log_prob, source: Noise | None,
    velocity_uncond, guidance_scale, velocity_ref, kl_coef, kl_value, step_weight,
    clip_low, clip_high, guard, reduction,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = rows.dtype
    a, b, std, k, c = (rows[..., COLUMNS.index(name)] for name in ("a", "b", "std", "k", "c"))

    def samples(x: Tensor) -> Tensor:
        """(R, *D) velocity rows -> (B, *D), in the dtype of the arithmetic."""
        return x.to(dtype) if row is None else x.to(dtype)[row]

    def constant(x: Tensor) -> Tensor:
        """The same without gradient: only the velocity has one, whatever the caller passes."""
        return samples(x.detach())

    def wide(scalar: Tensor) -> Tensor:
        return scalar.reshape(-1, *[1] * (velocity.ndim - 1))

    v = samples(velocity)
    if velocity_uncond is not None:
        uncond = constant(velocity_uncond)
        v = uncond + guidance_scale * (v - uncond)
    x, v_old = constant(x_t), v.detach() if old_velocity is None else constant(old_velocity)
    mean_old = wide(a) * x + wide(b) * v_old
    if x_next is None:
        noise = source.given
        if noise is None:
            noise = reference_normal(mean_old.shape, source, STREAMS["step"], x.device)
        x_next = torch.where(wide(std) > 0, mean_old + wide(std) * noise.to(dtype), mean_old)
    difference = wide(b) * (v - v_old)
    residual = x_next.detach().to(dtype) - mean_old

    if old_log_prob is not None:
        new_log_prob = c - k * _mean((residual - difference).square())
        log_ratio = new_log_prob - old_log_prob
    elif not guard:
        log_ratio = k * _mean(difference * (2 * residual - difference))
    else:
        noisy = torch.where(std > 0, std, torch.ones_like(std))
        log_ratio = torch.where(
            std > 0, _mean(residual * difference) / noisy, torch.zeros_like(std)
        )

    high, low = math.log1p(clip_high), math.log1p(-clip_low)
    clipped_high, clipped_low = (
        (advantage > 0) & (log_ratio > high),
        (advantage < 0) & (log_ratio < low),
    )
    clipped = torch.where(
        clipped_high | clipped_low, log_ratio.detach().clamp(low, high), log_ratio
    )
    loss = -advantage * (1 + torch.expm1(clipped))
    if step_weight is not None:
        loss = step_weight * loss

    kl = torch.zeros_like(log_ratio.detach())
    if velocity_ref is not None:
        # Rows with std == 0 have no density: their log-probability is 0, and so is their KL.
        scale = torch.where(std > 0, b / torch.where(std > 0, std, 1), 0)
        kl = scale.square() / 2 * _mean((v - constant(velocity_ref)).square())
        loss = loss + (kl_value if kl_coef is None else kl_coef) * kl
    if reduction == "mean":
        loss = loss.sum() / max(1, len(loss))
    elif reduction == "sum":
        loss = loss.sum()
    log_ratio = log_ratio.detach()
    return loss, log_ratio, log_ratio.exp(), kl.detach(), clipped_low, clipped_high


def _mean(x: Tensor) -> Tensor:
    """(B, *D) -> (B,); 0 where D is 0."""
    return x.flatten(1).mean(1) if x.numel() else x.flatten(1).sum(1)
