"""What a step reads: the one list of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class StepInputs(NamedTuple):
    """As implementations take it, once it is checked; a verb has `Coefficients` for edges.

    B samples.
    """

    x_t: Tensor  # (B, *D), as all latents
    velocity: Tensor
    edges: Tensor  # (B, columns), or (columns,) for all; its dtype is that of the arithmetic
    velocity_uncond: Tensor | None
    guidance_scale: float
    history: Sequence[Tensor]  # earlier x0 predictions, most recent first
