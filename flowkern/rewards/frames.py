"""Rewards of single images on videos: which frames they see, and how their scores become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowkern.checks import is_integer, shown
from flowkern.rewards.pixels import as_bytes, check_layout

__all__ = ["REDUCE", "FrameReward", "frame_numbers", "require_frames"]

REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(1),
    "min": lambda scores: scores.amin(1),
    "first": lambda scores: scores[:, 0],
}
"""Scores (B, n) of the frames of each video -> (B,)."""


def require_frames(frames: int | str) -> None:
    """Raise ValueError, naming frames, for what is neither a number of them nor "all"."""
    if frames != "all" and not (is_integer(frames) and frames >= 1):
        raise ValueError(f"frames: got {shown(frames)}, expected a whole number from 1, or 'all'")


def frame_numbers(count: int, frames: int | str) -> list[int]:
    """Of a video of `count` frames: all, or so many, evenly from the first to the last."""
    if frames == "all" or frames >= count:
        return list(range(count))
    return torch.linspace(0, count - 1, int(frames), dtype=torch.float64).round().long().tolist()


@dataclass(kw_only=True, eq=False)
class FrameReward(ABC):
    """A reward that scores images, and of a video some of its frames. A subclass has `score`, and
    its options as fields.
    """

    frames: int | str = 8
    """Of a video: how many are scored, evenly from the first to the last, or "all"."""
    reduce: str = "mean"
    """What their scores become: their mean, the least (min), or the first frame's (first), which
    alone is scored then; a video that only begins well is not seen by it."""

    scales: ClassVar[Mapping[str, tuple[float, float]]] = {"raw": (1.0, 0.0)}
    default_scale: ClassVar[str] = "raw"

    def __post_init__(self) -> None:
        require_frames(self.frames)
        if self.reduce not in REDUCE:
            known = ", ".join(REDUCE)
            raise ValueError(f"reduce: got {shown(self.reduce)}, expected one of {known}")
        if self.reduce == "first" and self.frames != FrameReward.frames:
            raise ValueError(f"frames: got {self.frames!r}, but reduce: first scores one alone")

    @abstractmethod
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (N, 3, H, W) -> raw scores (N,), and what else is to be reported of each."""

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], or uint8, and B prompts -> raw
        scores (B,), and entries (B,) by name: of a video's frames reduced as its scores.

        Raises ValueError for another layout, range or number.
        """
        check_layout(images, prompts)
        metadata = metadata or [{} for _ in prompts]
        if images.ndim == 4:
            return self.score(as_bytes(images), prompts, metadata)
        numbers = [0] if self.reduce == "first" else frame_numbers(images.shape[1], self.frames)
        rows = [row for row in range(len(images)) for _ in numbers]
        scores, entries = self.score(
            as_bytes(images[:, numbers]).flatten(0, 1),
            [prompts[row] for row in rows],
            [metadata[row] for row in rows],
        )
        reduced = REDUCE[self.reduce]
        shape = (len(images), len(numbers))
        return reduced(scores.view(shape)), {n: reduced(e.view(shape)) for n, e in entries.items()}
