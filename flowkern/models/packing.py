"""Patches of two by two latent pixels as tokens, as FLUX and Qwen-Image take them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flowkern.models.geometry import Geometry
from flowkern.models.grids import dynamic_mu, even
from flowkern.models.pipeline import Pipeline

PATCH = (2, 2)
"""Rows and columns of a token, which has all channels of them."""


class PackedPipeline(Pipeline):
    """A pipeline whose network takes such tokens, and whose grid may shift by their number."""

    def geometry(self) -> Geometry:
        channels = self.pipeline.transformer.config.in_channels
        scale = self.pipeline.vae_scale_factor
        own = self.pipeline.default_sample_size * scale
        return Geometry(channels // 4, scale, 2 * scale, own, own)

    def grid_arguments(self, num_steps: int) -> dict[str, Any]:
        _, height, width = self.latent_shape
        mu = dynamic_mu(self.pipeline.scheduler, height * width // 4)
        return {"mu": mu, "sigmas": even(num_steps)}


def packed(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C): patches by rows, each by channel, row and column."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`; height, width: of the latent."""
    patches = tokens.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@lru_cache(maxsize=8)
def positions(height: int, width: int, device: torch.device) -> Tensor:
    """(h w, 3) float32: 0, row and column of each token."""
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return torch.nn.functional.pad(grid, (1, 0)).float().to(device)
