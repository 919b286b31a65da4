"""Size of an image as a JPEG file, for and against: rewards without a network (DDPO, arXiv
2305.13301). They show whether a trainer learns, before a model judges anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowkern.rewards.files import encoded, pictures

__all__ = ["JpegCompressibility", "JpegIncompressibility"]

QUALITY = 95


class JpegIncompressibility:
    """The size of the image as a JPEG file of quality 95 with halved colour, in kB of 1000 bytes.

    It grows with detail and noise. The bytes are those of Pillow's encoder, and differ by about a
    percent between versions.
    """

    scales: ClassVar[Mapping[str, tuple[float, float]]] = {"raw": (1.0, 0.0)}
    default_scale: ClassVar[str] = "raw"
    sign: ClassVar[int] = 1

    def __call__(
        self, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[dict[str, Any]] = ()
    ) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B,) float64 on the host; no prompts are read."""
        # Pillow's own default, said here: another one would be another reward.
        sizes = [
            len(encoded(one, "JPEG", quality=QUALITY, subsampling=2)) for one in pictures(images)
        ]
        return torch.tensor(sizes, dtype=torch.float64) * (self.sign / 1000)


class JpegCompressibility(JpegIncompressibility):
    """The size with a minus, in kB: it grows as the image gets smoother. As flow_grpo has it, a
    500th of that.
    """

    scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "raw": (1.0, 0.0),
        "flow_grpo": (1 / 500, 0.0),
    }
    default_scale: ClassVar[str] = "flow_grpo"
    sign: ClassVar[int] = -1
