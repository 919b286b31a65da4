"""Size of an image as a JPEG file, for and against: rewards without a network (DDPO, arXiv
2305.13301). They show whether a trainer learns, before a model judges anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowkern.rewards.files import encoded, pictures
from flowkern.rewards.frames import FrameReward

__all__ = ["JpegCompressibility", "JpegIncompressibility"]

QUALITY = 95


@dataclass(kw_only=True, eq=False)
class JpegIncompressibility(FrameReward):
    """The size of the image as a JPEG file of quality 95 with halved colour, in kB of 1000 bytes.

    It grows with detail and noise, and reads no prompt. The bytes are those of Pillow's encoder,
    and differ by about a percent between versions.
    """

    sign: ClassVar[int] = 1

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Pillow's own default, said here: another one would be another reward.
        files = [encoded(one, "JPEG", quality=QUALITY, subsampling=2) for one in pictures(images)]
        sizes = torch.tensor([len(file) for file in files], dtype=torch.float64)
        return sizes * (self.sign / 1000), {}


@dataclass(kw_only=True, eq=False)
class JpegCompressibility(JpegIncompressibility):
    """The size with a minus, in kB: it grows as the image gets smoother. flow_grpo's scale is a
    500th of that.
    """

    sign: ClassVar[int] = -1
    scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "raw": (1.0, 0.0),
        "flow_grpo": (1 / 500, 0.0),
    }
    default_scale: ClassVar[str] = "flow_grpo"
