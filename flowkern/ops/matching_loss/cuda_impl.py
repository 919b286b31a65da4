"""The matching losses on the native CUDA kernels (csrc/matching_loss): one launch per direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkern.ops._common import native, native_cuda
from flowkern.ops._common.arguments import STREAMS, Noise, per_sample_contiguous
from flowkern.ops._common.native import address, latent


def forward(
    velocity, x0, sigma, advantage, row, source: Noise, nft: bool, weighting: int,
    old_velocity, velocity_ref, velocity_ema,
    ref_coef: float, ema_coef: float, clip_low: float, clip_high: float, reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of MatchingLoss, and the slopes (B, 4)."""
    batch, device = len(x0), x0.device
    # Bound to names until the kernel is launched: it sees addresses only.
    latents = _latents(velocity, x0, old_velocity, velocity_ref, velocity_ema, source.given)
    row, sigma, advantage = map(_contiguous, (row, sigma, advantage))
    loss = torch.empty(batch if reduction == "none" else (), dtype=torch.float32, device=device)
    statistics = [torch.empty_like(sigma) for _ in range(5)]
    clipped = [torch.empty_like(sigma, dtype=torch.bool) for _ in range(2)]
    slopes = torch.empty((batch, 4), dtype=torch.float32, device=device)
    if batch == 0:
        return loss.zero_(), *statistics, *clipped, slopes
    module = native.cuda()
    module.matching_forward(
        *_common(latents, row, source, slopes), address(sigma), address(advantage),
        nft, weighting, ref_coef, ema_coef, clip_low, clip_high,
        reduction == "mean", reduction != "none",
        tuple(map(address, (loss, *statistics, *clipped))),
        native_cuda.scratch(x0, batch, math.prod(x0.shape[1:]), module.matching_sums),
    )  # fmt: skip
    return loss, *statistics, *clipped, slopes


def backward(
    grad, slopes, velocity, x0, sigma, row, source: Noise, nft: bool,
    old_velocity, velocity_ref, velocity_ema,
) -> Tensor:  # fmt: skip
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    if grad_velocity.numel() == 0:
        return grad_velocity
    latents = _latents(velocity, x0, old_velocity, velocity_ref, velocity_ema, source.given)
    row, slopes = map(_contiguous, (row, slopes))
    grad = grad.float().contiguous()
    native.cuda().matching_backward(
        *_common(latents, row, source, slopes), address(grad), grad.ndim, latent(grad_velocity)
    )
    return grad_velocity


def add_noise(x0: Tensor, sigma: Tensor, source: Noise) -> Tensor:
    out = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    if out.numel() == 0:
        return out
    x0, noise = _latents(x0, source.given)
    sigma = sigma.contiguous()
    native.cuda().add_noise(
        native_cuda.queue(x0), len(x0), math.prod(x0.shape[1:]), latent(x0), latent(noise),
        latent(out), native_cuda.key(source, STREAMS["match"]), address(sigma),
    )  # fmt: skip
    return out


def _latents(*latents: Tensor | None) -> list[Tensor | None]:
    """velocity, x0, old_velocity, velocity_ref, velocity_ema, noise, as the kernels read them."""
    return [None if x is None else per_sample_contiguous(x) for x in latents]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _common(latents: list[Tensor | None], row: Tensor | None, source: Noise, slopes) -> tuple:
    velocity, x0 = latents[:2]
    return (
        native_cuda.queue(x0), len(velocity), len(x0), math.prod(x0.shape[1:]),
        tuple(map(latent, latents)), address(row), native_cuda.key(source, STREAMS["match"]),
        address(slopes),
    )  # fmt: skip
