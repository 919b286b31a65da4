"""CLIPScore: how well an image fits its prompt (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flowkern.rewards.towers import TowerReward, load_clip

__all__ = ["ClipScore"]


@dataclass(kw_only=True, eq=False)
class ClipScore(TowerReward):
    """The cosine of image and prompt, by any CLIP."""

    path: str = "openai/clip-vit-large-patch14"
    processor: str | None = None
    """A directory or id with the tokenizer and the image processor; null: path has them."""

    scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "raw": (1.0, 0.0),
        "paper": (2.5, 0.0),
        "torchmetrics": (100.0, 0.0),
        "unirl": (100 / 30, 0.0),
    }
    default_scale: ClassVar[str] = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clip = load_clip(self, self.processor)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (N, 3, H, W) and N prompts -> cosines (N,), and which prompts were cut."""
        return self.clip.cosine(images, prompts)
