"""PickScore: which of two images people picked, for a prompt (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flowkern.rewards.towers import TowerReward, load_clip

__all__ = ["PickScore"]


@dataclass(kw_only=True, eq=False)
class PickScore(TowerReward):
    """The model's logit, exp(logit_scale) times the cosine of image and prompt."""

    path: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """A directory or id with the tokenizer and the image processor, which path lacks."""

    scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "raw": (1.0, 0.0),
        "flow_grpo": (1 / 26, 0.0),
        "mixgrpo": (1 / 8, -18 / 8),
    }
    default_scale: ClassVar[str] = "flow_grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clip = load_clip(self, self.processor)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (N, 3, H, W) and N prompts -> logits (N,), and which prompts were cut."""
        cosine, cut = self.clip.cosine(images, prompts)
        return cosine * self.clip.logit_scale, cut
