"""What guidance reads, and where its tokens lie: the one list of it."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class GuidanceInputs(NamedTuple):
    """As implementations take it, once it is checked. B samples."""

    velocity: Tensor  # (B, C, *rows, width), as all latents
    velocity_uncond: Tensor
    guidance_scale: float
    patch_rows: int
    patch_width: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels, rows in all, and their width, of latents that have any elements."""
        _, channels, *between = self.velocity.shape
        width = between.pop() if between else 1
        return channels, math.prod(between), width
