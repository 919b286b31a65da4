"""The policy loss in plain torch: the truth, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS
from flowkern.ops._common.loss_reference import (
    clipped_policy,
    log_clip,
    mean,
    reduced,
    samples_of,
    wide,
)
from flowkern.ops._common.philox import reference_normal
from flowkern.schedules import COLUMNS

from .inputs import PolicyInputs


def policy_loss(i: PolicyInputs) -> tuple[Tensor, ...]:
    """The fields of PolicyLoss. Only the velocity has a gradient, whatever the caller passes."""
    b, std = (i.c_rows[..., COLUMNS.index(name)] for name in ("b", "std"))
    samples = samples_of(i.row, i.c_rows.dtype)
    v = samples(i.velocity)
    if i.velocity_uncond is not None:
        uncond = samples(i.velocity_uncond.detach())
        v = uncond + i.guidance_scale * (v - uncond)
    log_ratio = _log_ratio(i, v)
    loss, clipped_low, clipped_high = clipped_policy(
        i.advantage, log_ratio, log_clip(i.clip_low, i.clip_high)
    )
    if i.step_weight is not None:
        loss = i.step_weight * loss
    kl = torch.zeros_like(log_ratio.detach())
    if i.velocity_ref is not None:
        # Rows with std == 0 have no density: their log-probability is 0, and so is their KL.
        scale = torch.where(std > 0, b / torch.where(std > 0, std, 1), 0)
        kl = scale.square() / 2 * mean((v - samples(i.velocity_ref.detach())).square())
        loss = loss + i.kl_coef * kl
    loss, log_ratio = reduced(loss, i.reduction), log_ratio.detach()
    return loss, log_ratio, log_ratio.exp(), kl.detach(), clipped_low, clipped_high


def _log_ratio(i: PolicyInputs, v: Tensor) -> Tensor:
    """(B,), of the guided velocity of each sample."""
    samples = samples_of(i.row, i.c_rows.dtype)
    a, b, std, k, c = (i.c_rows[..., COLUMNS.index(name)] for name in ("a", "b", "std", "k", "c"))
    v_old = v.detach() if i.old_velocity is None else samples(i.old_velocity.detach())
    mean_old = wide(a, v) * samples(i.x_t.detach()) + wide(b, v) * v_old
    x_next = i.x_next
    if x_next is None:
        noise = i.noise
        if noise is None:
            noise = reference_normal(mean_old.shape, i.source, STREAMS["step"], v.device)
        drawn = mean_old + wide(std, v) * noise.to(mean_old.dtype)
        x_next = torch.where(wide(std, v) > 0, drawn, mean_old)
    difference = wide(b, v) * (v - v_old)
    residual = x_next.detach().to(mean_old.dtype) - mean_old
    if i.old_log_prob is not None:
        return c - k * mean((residual - difference).square()) - i.old_log_prob
    if i.ratio == "sde":
        return k * mean(difference * (2 * residual - difference))
    noisy = torch.where(std > 0, std, torch.ones_like(std))
    return torch.where(std > 0, mean(residual * difference) / noisy, torch.zeros_like(std))
