"""The matching losses in plain torch: the truth, differentiated by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkern.ops._common.arguments import STREAMS, Noise
from flowkern.ops._common.philox import reference_normal

GHUBER_EPS = 1e-10
WEIGHTINGS = ("uniform", "t", "ghuber")  # kernels take the index


def noise_of(source: Noise, x0: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, *D): what was given, or the Philox normals of x0's shape."""
    noise = source.given
    if noise is None:
        noise = reference_normal(x0.shape, source, STREAMS["match"], x0.device)
    return noise.to(dtype)


def add_noise(x0: Tensor, sigma: Tensor, source: Noise) -> Tensor:
    t = _wide(sigma, x0)
    with torch.no_grad():  # and not of detached tensors: a forward-mode tangent passes
        return ((1 - t) * x0 + t * noise_of(source, x0, sigma.dtype)).to(x0.dtype)


def matching_loss(
    velocity, x0, sigma, advantage, row, source: Noise, nft, weighting,
    old_velocity, velocity_ref, velocity_ema, ref_coef, ema_coef, clip_low, clip_high, reduction,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of MatchingLoss; sigma and advantage are in the dtype of the arithmetic."""
    dtype = sigma.dtype

    def samples(x: Tensor) -> Tensor:
        """(R, *D) velocity rows -> (B, *D), in the dtype of the arithmetic."""
        return x.to(dtype) if row is None else x.to(dtype)[row]

    def distance(anchor: Tensor | None) -> Tensor:
        """mean_D((velocity - anchor)^2), 0 where there is none."""
        if anchor is None:
            return torch.zeros_like(sigma)
        return _mean((v - samples(anchor.detach())).square())

    v = samples(velocity)
    v_old = v.detach() if old_velocity is None else samples(old_velocity.detach())
    u = (noise_of(source, x0, dtype) - x0.to(dtype)).detach()
    if nft:
        matching = _nft(v, v_old, u, sigma, advantage)
        loss, log_ratio = 5 * matching, torch.zeros_like(sigma)
        clipped_low, clipped_high = (torch.zeros_like(sigma, dtype=torch.bool) for _ in range(2))
    else:
        matching = _mean((v - u).square())
        log_ratio = _awm_log_ratio(v, v_old, u, matching, sigma, weighting)
        low = math.log1p(-clip_low) if clip_low < 1 else -math.inf
        high = math.log1p(clip_high)
        clipped_low = (advantage < 0) & (log_ratio < low)
        clipped_high = (advantage > 0) & (log_ratio > high)
        clamped = log_ratio.detach().clamp(low, high)
        kept = torch.where(clipped_low | clipped_high, clamped, log_ratio)
        loss = -advantage * (1 + torch.expm1(kept))

    ref, ema = distance(velocity_ref), distance(velocity_ema)
    loss = loss + ref_coef * ref + ema_coef * ema
    if reduction == "mean":
        loss = loss.sum() / max(1, len(loss))
    elif reduction == "sum":
        loss = loss.sum()
    log_ratio = log_ratio.detach()
    statistics = (matching.detach(), ref.detach(), ema.detach(), clipped_low, clipped_high)
    return loss, log_ratio, log_ratio.exp(), *statistics


def _awm_log_ratio(v, v_old, u, matching, sigma, weighting) -> Tensor:
    """log p - log p_old in difference form, so that the rounding is relative to the difference.

    ghuber: 4 (a - b) with fourth roots a, b is 4 (a^4 - b^4) / ((a^2 + b^2) (a + b)).
    """
    drift = _mean((v - v_old) * ((v - u) + (v_old - u)))
    if weighting == "uniform":
        return -drift
    if weighting == "t":
        return -sigma * drift
    a = (matching + GHUBER_EPS).sqrt()
    b = (_mean((v_old - u).square()) + GHUBER_EPS).sqrt()
    return -4 * sigma * drift / ((a + b) * (a.sqrt() + b.sqrt()))


def _nft(v, v_old, u, sigma, advantage) -> Tensor:
    """t^2 [r mean(plus^2) / w+ + (1 - r) mean(minus^2) / w-]; the weights have no gradient."""

    def normalized(residual: Tensor) -> Tensor:
        weight = (sigma * _mean(residual.detach().abs())).clamp(min=1e-5)
        return sigma.square() * _mean(residual.square()) / weight

    r = (0.5 + 0.5 * advantage).clamp(0, 1)
    return r * normalized(v - u) + (1 - r) * normalized(2 * v_old - v - u)


def _wide(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.reshape(-1, *[1] * (like.ndim - 1))


def _mean(x: Tensor) -> Tensor:
    """(B, *D) -> (B,); 0 where D is 0."""
    return x.flatten(1).mean(1) if x.numel() else x.flatten(1).sum(1)
