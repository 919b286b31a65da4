"""What families share whose network is told a guidance scale, having learned from two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkern.models import Guidance
from flowkern.models.pipeline import Pipeline

__all__ = ["EmbeddedPipeline"]


class EmbeddedPipeline(Pipeline):
    """A guidance_scale beyond 1 is two passes on top of what the network is told."""

    guidance = Guidance("embedded")

    def __init__(
        self, pipeline: Any, *, guidance_embedding: float | None = None, **options: Any
    ) -> None:
        """guidance_embedding: what the network is told; None: the guidance_scale of the pipeline's
        own call, where the network takes any.

        Raises ValueError for a network that takes none.
        """
        takes = pipeline.transformer.config.guidance_embeds
        if guidance_embedding is not None and not takes:
            raise ValueError(
                f"guidance_embedding: got {guidance_embedding}, but this network takes none"
            )
        own = self.default("guidance_scale") if guidance_embedding is None else guidance_embedding
        self.guidance_embedding = own if takes else None
        super().__init__(pipeline, **options)

    def embedding(self, sigma: Tensor) -> Tensor | None:
        """What the network is told of every row, (B,) float32 as sigma."""
        if self.guidance_embedding is None:
            return None
        return torch.full_like(sigma, self.guidance_embedding)
