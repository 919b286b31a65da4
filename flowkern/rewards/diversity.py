"""How much an image differs from its group's others: what falls when a policy collapses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowkern.rewards.frames import frame_numbers, require_frames
from flowkern.rewards.groups import differences, groups_of
from flowkern.rewards.pixels import as_bytes, check_layout
from flowkern.rewards.processors import PICTURES, Pixels
from flowkern.rewards.towers import ImageTower, TowerOptions, load_network, unit
from flowkern.rewards.weights import device_of, folder_of

__all__ = ["Diversity"]


@dataclass(kw_only=True, eq=False)
class Diversity(TowerOptions):
    """1 minus the cosine of an image's feature and those of its group's others, their mean or the
    nearest one's: 0 among copies. NaN for an image that is alone in its group.
    """

    path: str = "facebook/dinov2-base"
    """A DINOv2, or a CLIP, whose image tower is taken."""
    processor: str | None = None
    """A directory or id with the image processor; null: path has it."""
    distance_to: str = "mean"
    """"mean": to all others; "nearest": to the most alike of them."""
    frames: int | str = 8
    """Of a video: how many are looked at, evenly from the first to the last, or "all"."""

    may_fail: ClassVar[bool] = True
    """A group of one has no diversity, and that is no fault."""
    scales: ClassVar[Mapping[str, tuple[float, float]]] = {"raw": (1.0, 0.0)}
    default_scale: ClassVar[str] = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance_to not in ("mean", "nearest"):
            raise ValueError(f"distance_to: got {self.distance_to!r}, expected mean or nearest")
        require_frames(self.frames)
        network, folder = load_network(
            self.path, self.revision, self.dtype, self.device, "dinov2", "clip"
        )
        key = "path" if self.processor is None else "processor"
        if self.processor is not None:
            folder = folder_of(self.processor, None, PICTURES, key)
        self.tower = ImageTower(network, Pixels.of(folder, key), device_of(self.device), self.batch)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]] = (),
        *,
        group: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], whole groups -> (B,) float32.

        group: a number per image, the same within a group; None: images of one prompt are one.
        A video is the mean of its frames' features. Raises ValueError as all rewards of frames, and
        for another number of groups.
        """
        check_layout(images, prompts)
        group = groups_of(group, prompts)
        if images.ndim == 5:
            images = images[:, frame_numbers(images.shape[1], self.frames)]
        features = self.tower.image_features(as_bytes(images).flatten(0, -4))
        features = unit(features.view(len(images), -1, features.shape[-1]).mean(1))
        return differences(features, group.to(features.device), self.distance_to)
