"""HPS v2 and v2.1: which of several images people prefer, for a prompt (arXiv 2306.09341)."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkern.checks import shown
from flowkern.rewards.open_clip import clip_of
from flowkern.rewards.processors import PROCESSOR, Words
from flowkern.rewards.resize import CLIP_MEAN, CLIP_STD
from flowkern.rewards.towers import Clip, TowerReward, shared
from flowkern.rewards.weights import device_of, file_of, folder_of, read_state

__all__ = ["HpsV2", "fit_long_edge"]

FILES = {2.0: "HPS_v2_compressed.pt", 2.1: "HPS_v2.1_compressed.pt"}
HEADS = 16  # of both towers of ViT-H/14


@dataclass(kw_only=True, eq=False)
class HpsV2(TowerReward):
    """The cosine of image and prompt."""

    path: str = "xswu/HPSv2"
    """A directory or id with the published checkpoint, or that file."""
    version: float = 2.1
    """2.0 or 2.1."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """A directory or id with the tokenizer, which path lacks."""
    antialias: bool = True
    """Of the resize; false is what its package did under torchvision before 0.17."""

    scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "raw": (1.0, 0.0),
        "benchmark": (100.0, 0.0),
    }
    default_scale: ClassVar[str] = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in FILES:
            raise ValueError(f"version: got {shown(self.version)}, expected 2.0 or 2.1")
        file = file_of(self.path, self.revision, FILES[self.version])
        words = folder_of(self.processor, None, PROCESSOR, "processor")

        def load() -> torch.nn.Module:
            try:
                # The first end token is the highest id there is, which open_clip looks for.
                state = read_state(file)
                end = len(state.get("token_embedding.weight", ())) - 1
                return clip_of(state, heads=HEADS, activation="gelu", end=end)
            except ValueError as error:
                said = str(error)
                if said.startswith("path: "):
                    raise
                raise ValueError(f"path: {str(file)!r} is {said}") from None

        network = shared((str(file.resolve()), "hpsv2"), self.dtype, self.device, load)
        side = network.config.vision_config.image_size
        self.clip = Clip(
            network,
            lambda images: fit_long_edge(images, side, antialias=self.antialias),
            device_of(self.device),
            self.batch,
            Words(words, network.config.text_config, "processor"),
            clean,
        )

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (N, 3, H, W) and N prompts -> cosines (N,), and which prompts were cut."""
        return self.clip.cosine(images, prompts)


def clean(prompt: str) -> str:
    """open_clip reads HTML's names of characters, twice, before it cuts tokens: &amp;lt; is a <.
    (It repairs mojibake, too, which this does not.)
    """
    return html.unescape(html.unescape(prompt)).strip()


def fit_long_edge(images: Tensor, side: int, *, antialias: bool = True) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, side, side), normalised: the longer edge becomes `side`,
    black fills up the other around the middle.

    The reference resizes floats, so this is no bytes' arithmetic, and overshoot stays.
    """
    height, width = images.shape[-2:]
    new = [max(1, round(n * side / max(height, width))) for n in (height, width)]
    values = images.to(torch.float32).div_(255)
    if [height, width] != new:
        values = F.interpolate(
            values, size=new, mode="bicubic", antialias=antialias, align_corners=False
        )
    down, across = (side - n for n in new)
    values = F.pad(values, (across // 2, across - across // 2, down // 2, down - down // 2))
    mean, std = (values.new_tensor(one).view(3, 1, 1) for one in (CLIP_MEAN, CLIP_STD))
    return values.sub_(mean).div_(std)
