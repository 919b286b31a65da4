"""What a step reads and writes: the one list of each, as implementations take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StepInputs(NamedTuple):
    """Once it is checked; a verb has `Coefficients` for edges. B samples."""

    x_t: Tensor  # (B, *D), as all latents
    velocity: Tensor
    edges: Tensor  # (B, columns), or (columns,) for all; its dtype is that of the arithmetic
    velocity_uncond: Tensor | None
    guidance_scale: float
    history: Sequence[Tensor] = ()  # earlier x0 predictions, most recent first

    @property
    def scale(self) -> float:
        """d guided velocity / d velocity."""
        return 1.0 if self.velocity_uncond is None else self.guidance_scale


class StepOutputs(NamedTuple):
    """What a draw writes; None: not wanted."""

    x_next: Tensor
    log_prob: Tensor | None = None
    x0: Tensor | None = None  # in the dtype of x_next
    mean: Tensor | None = None  # in that of the arithmetic
    round_dtype: torch.dtype | None = None  # what x_next is rounded through first


class FromMean(NamedTuple):
    """What the gradient of a step is made from where its mean was kept."""

    x_next: Tensor
    mean: Tensor
    edges: Tensor
    scale: float  # of StepInputs
