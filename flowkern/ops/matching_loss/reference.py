"""The matching losses in plain torch: the truth, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS, Noise
from flowkern.ops._common.loss_reference import (
    clipped_policy,
    log_clip,
    mean,
    reduced,
    samples_of,
    wide,
)
from flowkern.ops._common.philox import reference_normal

from .inputs import GHUBER_POWER, MatchingInputs

GHUBER_EPS = 1e-10


def noise_of(source: Noise, x0: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, *D): what was given, or the Philox normals of x0's shape."""
    noise = source.given
    if noise is None:
        noise = reference_normal(x0.shape, source, STREAMS["match"], x0.device)
    return noise.to(dtype)


def add_noise(x0: Tensor, sigma: Tensor, source: Noise) -> Tensor:
    t = wide(sigma, x0)
    with torch.no_grad():  # and not of detached tensors: a forward-mode tangent passes
        return ((1 - t) * x0 + t * noise_of(source, x0, sigma.dtype)).to(x0.dtype)


def matching_loss(i: MatchingInputs) -> tuple[Tensor, ...]:
    """The fields of MatchingLoss. Only the velocity has a gradient, whatever the caller passes."""
    sigma, dtype = i.sigma, i.sigma.dtype
    samples = samples_of(i.row, dtype)

    def distance(anchor: Tensor | None) -> Tensor:
        """mean_D((velocity - anchor)^2), 0 where there is none."""
        if anchor is None:
            return torch.zeros_like(sigma)
        return mean((v - samples(anchor.detach())).square())

    v = samples(i.velocity)
    v_old = v.detach() if i.old_velocity is None else samples(i.old_velocity.detach())
    u = (noise_of(i.source, i.x0, dtype) - i.x0.to(dtype)).detach()
    if i.objective == "nft":
        matching = _nft(i, v, v_old, u)
        loss, log_ratio = 5 * matching / i.nft_beta, torch.zeros_like(sigma)
        clipped_low, clipped_high = (torch.zeros_like(sigma, dtype=torch.bool) for _ in range(2))
    else:
        matching = mean((v - u).square())
        log_ratio = _awm_log_ratio(i, v, v_old, u, matching)
        loss, clipped_low, clipped_high = clipped_policy(
            i.advantage, log_ratio, log_clip(i.clip_low, i.clip_high)
        )
    ref, ema = distance(i.velocity_ref), distance(i.velocity_ema)
    loss = reduced(loss + i.ref_coef * ref + i.ema_coef * ema, i.reduction)
    log_ratio = log_ratio.detach()
    statistics = (matching.detach(), ref.detach(), ema.detach(), clipped_low, clipped_high)
    return loss, log_ratio, log_ratio.exp(), *statistics


def _awm_log_ratio(i: MatchingInputs, v, v_old, u, matching) -> Tensor:
    """log p - log p_old in difference form, so that the rounding is relative to the difference.

    ghuber: 4 (a - b) with fourth roots a, b is 4 (a^4 - b^4) / ((a^2 + b^2) (a + b)); with another
    power, of the change of log M.
    """
    t, drift = i.sigma, mean((v - v_old) * ((v - u) + (v_old - u)))
    if i.weighting == "uniform":
        return -drift
    if i.weighting in ("t", "t2"):
        return -(t if i.weighting == "t" else t * t) * drift
    m, m_old = matching + GHUBER_EPS, mean((v_old - u).square()) + GHUBER_EPS
    a, b = m.sqrt(), m_old.sqrt()
    if i.weighting == "huber":
        return -t * drift / (a + b)
    if i.ghuber_power == GHUBER_POWER:
        return -4 * t * drift / ((a + b) * (a.sqrt() + b.sqrt()))
    power, is_same = i.ghuber_power, drift == 0
    m_old = torch.where(is_same, 1, m_old)
    change = drift / m_old
    is_near = change > -0.5  # below, 1 + change has lost digits that m has
    log_change = torch.where(is_near, torch.where(is_near, change, 0).log1p(), (m / m_old).log())
    log_ratio = -t / power * m_old**power * torch.expm1(power * log_change)
    # 0 with its slope, also where M overflows.
    return torch.where(is_same, -t * m.detach() ** (power - 1) * drift, log_ratio)


def _nft(i: MatchingInputs, v, v_old, u) -> Tensor:
    """t^2 [r mean(plus^2) / w+ + (1 - r) mean(minus^2) / w-]; the weights have no gradient."""
    towards = v_old + i.nft_beta * (v - v_old) if i.nft_beta != 1 else v

    def normalized(residual: Tensor) -> Tensor:
        square = i.sigma.square() * mean(residual.square())
        if i.weighting == "uniform":
            return square
        return square / (i.sigma * mean(residual.detach().abs())).clamp(min=1e-5)

    r = (0.5 + 0.5 * i.advantage).clamp(0, 1)
    return r * normalized(towards - u) + (1 - r) * normalized(2 * v_old - towards - u)
