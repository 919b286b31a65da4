"""LAION's aesthetic predictor: how an image is liked by itself, from 1 to 10 or so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowkern.rewards.towers import TowerReward, load_clip
from flowkern.rewards.weights import file_of, linear_layers, read_state

__all__ = ["Aesthetic"]


@dataclass(kw_only=True, eq=False)
class Aesthetic(TowerReward):
    """A head of five linear layers on CLIP's image feature; prompts are not read."""

    path: str = "openai/clip-vit-large-patch14"
    processor: str | None = None
    """A directory or id with the image processor; null: path has it."""
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    """The head: a file, or a directory or id with aesthetic-model.pth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clip = load_clip(self, self.processor)
        file = file_of(self.head, None, "aesthetic-model.pth", "head")
        width = self.clip.network.config.projection_dim
        self.layers = linear_layers(read_state(file, "head"), "layers.", width, "head")

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (N, 3, H, W) -> (N,) float32."""
        features = self.clip.image_features(images)
        return self.layers.to(features.device)(features).squeeze(-1), {}
