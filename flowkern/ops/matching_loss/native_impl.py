"""The matching losses on the native CPU kernels (csrc/matching_loss)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkern.ops._common import native
from flowkern.ops._common.arguments import STREAMS, Noise, per_sample_contiguous
from flowkern.ops._common.native import address, latent


def forward(
    velocity, x0, sigma, advantage, row, source: Noise, nft: bool, weighting: int,
    old_velocity, velocity_ref, velocity_ema,
    ref_coef: float, ema_coef: float, clip_low: float, clip_high: float, reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of MatchingLoss, and the slopes (B, 4)."""
    batch = x0.shape[0]
    loss = torch.empty(batch if reduction == "none" else (), dtype=torch.float32)
    statistics = [torch.empty(batch, dtype=torch.float32) for _ in range(5)]
    clipped = [torch.empty(batch, dtype=torch.bool) for _ in range(2)]
    slopes = torch.empty(batch, 4, dtype=torch.float32)
    # Bound to names until the kernel returns: it sees addresses only.
    latents = _latents(velocity, x0, old_velocity, velocity_ref, velocity_ema, source.given)
    row, sigma, advantage = map(_contiguous, (row, sigma, advantage))
    native.cpu().matching_forward(
        *_common(latents, row, source, slopes), address(sigma), address(advantage),
        nft, weighting, ref_coef, ema_coef, clip_low, clip_high,
        reduction == "mean", reduction != "none",
        tuple(map(address, (loss, *statistics, *clipped))),
    )  # fmt: skip
    return loss, *statistics, *clipped, slopes


def backward(
    grad, slopes, velocity, x0, sigma, row, source: Noise, nft: bool,
    old_velocity, velocity_ref, velocity_ema,
) -> Tensor:  # fmt: skip
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype)
    latents = _latents(velocity, x0, old_velocity, velocity_ref, velocity_ema, source.given)
    row, slopes = map(_contiguous, (row, slopes))
    grad = grad.float().contiguous()
    native.cpu().matching_backward(
        *_common(latents, row, source, slopes), address(grad), grad.ndim, latent(grad_velocity)
    )
    return grad_velocity


def add_noise(x0: Tensor, sigma: Tensor, source: Noise) -> Tensor:
    out = torch.empty(x0.shape, dtype=x0.dtype)
    x0, noise, sigma = map(_contiguous, (x0, source.given, sigma))
    native.cpu().add_noise(
        x0.shape[0], math.prod(x0.shape[1:]), latent(x0), latent(noise), latent(out), _key(source),
        address(sigma), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _latents(*latents: Tensor | None) -> list[Tensor | None]:
    """velocity, x0, old_velocity, velocity_ref, velocity_ema, noise, as the kernels read them."""
    return [None if x is None else per_sample_contiguous(x) for x in latents]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _key(source: Noise) -> tuple:
    ids = address(source.sample_id), address(source.step)
    return source.seed & (2**64 - 1), *ids, source.step_value, STREAMS["match"]


def _common(latents: list[Tensor | None], row: Tensor | None, source: Noise, slopes) -> tuple:
    velocity, x0 = latents[:2]
    return (
        velocity.shape[0], x0.shape[0], math.prod(x0.shape[1:]), tuple(map(latent, latents)),
        address(row), _key(source), address(slopes), torch.get_num_threads(),
    )  # fmt: skip
