"""What families of videos share. F frames of a video, f of its latent."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from flowkern.models.geometry import Geometry
from flowkern.models.pipeline import Pipeline

__all__ = ["VideoPipeline"]


class VideoPipeline(Pipeline):
    """A pipeline of videos: latents are (C, f, h, w), decoded ones (F, 3, H, W)."""

    def __init__(self, pipeline: Any, *, num_frames: int | None = None, **options: Any) -> None:
        """num_frames: of a video; None: the pipeline's own.

        Raises ValueError for a number of frames that no latent has.
        """
        self.num_frames = self.default("num_frames") if num_frames is None else num_frames
        super().__init__(pipeline, **options)
        step = self.frame_step()
        if self.num_frames < 1 or self.num_frames % step != 1:
            raise ValueError(
                f"num_frames: got {self.num_frames}, expected {step} k + 1, as 1, {step + 1}, "
                f"{2 * step + 1}"
            )

    @abstractmethod
    def frame_step(self) -> int:
        """Frames of a video to one of its latent, beyond the first."""

    @abstractmethod
    def cells(self) -> tuple[int, int, int]:
        """Channels of a latent, pixels to one of its cells along each side, and cells to a patch of
        the network."""

    def geometry(self) -> Geometry:
        channels, cell, patch = self.cells()
        own = self.default("height"), self.default("width")
        return Geometry(channels, cell, cell * patch, *own)

    def own_length(self) -> int:
        return self.default("max_sequence_length")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, f, h, w) of one latent."""
        channels, *size = super().latent_shape
        return channels, (self.num_frames - 1) // self.frame_step() + 1, *size

    @property
    def pixels(self) -> int:
        return super().pixels * self.num_frames

    def to_pixels(self, decoded: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, F, 3, H, W) in [0, 1]."""
        return self.pipeline.video_processor.postprocess_video(decoded, output_type="pt")

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"num_frames": self.num_frames}
