"""MixGRPO-Flash* (arXiv 2507.21802; github.com/Tencent-Hunyuan/MixGRPO, FLUX.1-dev on 720 x 720).

MixGRPO-Flash whose window stays at the start, with still fewer steps after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowkern.rl.algorithms.mixgrpo_flash import MixGRPOFlash


@dataclass(frozen=True, kw_only=True)
class MixGRPOFlashStar(MixGRPOFlash):
    """The released defaults."""

    stride: int = 0
    tail_ratio: float | None = 0.2
