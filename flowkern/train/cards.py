"""Cards by their data sheets, and how long kernels take on one.

A kernel takes the longer of its operations at a share of the peak and its bytes at a share of the
bandwidth, and LAUNCH beside: what eager PyTorch takes between kernels, and kernels too small to
fill a card. These three were chosen so that six calls of networks measured on an H200 come out
within 6 % (docs/doctor.md); of other cards nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowkern.train.dry_run import Taken

__all__ = ["CARDS", "Card"]

OF_PEAK, OF_BANDWIDTH, LAUNCH = 0.70, 0.85, 16e-6
COMPILED = 0.62
"""Of an eager call's time with model.compile: on an H200 three iterations took
.54, .63 and .81 of it, single calls .47 to .61 (docs/gpu.md)."""

DECODING = 2.1
"""Times what is counted, memory and seconds of a VAE: its convolutions need room of the library's.
Eight images of 512 px took 13.8 GB and .154 s on an H200, where 6.4 and .08 are counted."""


@dataclass(frozen=True)
class Card:
    memory: float
    """GB, of 10^9 bytes, that its name says: what it has beyond is left for what is not counted."""
    peak: float
    """TFLOP/s of dense products in bfloat16, added in float32."""
    bandwidth: float
    """TB/s"""
    source: str

    def seconds(self, taken: Taken, is_wide: bool = False) -> float:
        """is_wide: its products are float32, by TF32: half of the peak."""
        peak = self.peak * 1e12 * OF_PEAK / (2 if is_wide else 1)
        bandwidth = self.bandwidth * 1e12 * OF_BANDWIDTH
        return sum(
            count * (max(kernel.operations / peak, kernel.bytes / bandwidth) + LAUNCH)
            for kernel, count in taken.kernels.items()
        )


CARDS = {
    "rtx4090": Card(24, 165, 1.008, "NVIDIA's Ada architecture paper"),
    "l40s": Card(48, 362, 0.864, "NVIDIA's L40S data sheet"),
    "a100": Card(80, 312, 2.039, "NVIDIA's A100 80GB SXM data sheet"),
    "h100": Card(80, 989, 3.35, "NVIDIA's H100 SXM data sheet"),
    "h200": Card(141, 989, 4.8, "NVIDIA's H200 SXM data sheet"),
}
