"""What sizes a pipeline draws."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Geometry"]


class Geometry(NamedTuple):
    """What sizes a pipeline's latents have, and its own."""

    channels: int
    """Of a latent, unpacked."""
    cell: int
    """Pixels of an image to one of a latent, along each side."""
    unit: int
    """Pixels that heights and widths are multiples of."""
    height: int
    width: int
    most: int | None = None
    """Pixels of a side, beyond which the network has no positions; None: it has."""

    def require(self, **sides: int) -> None:
        """Raise ValueError, beginning with its name, for a side that no image has, in pixels."""
        for name, pixels in sides.items():
            if pixels <= 0 or pixels % self.unit:
                raise ValueError(
                    f"{name}: got {pixels}, expected a positive multiple of {self.unit}"
                )
            if self.most is not None and pixels > self.most:
                raise ValueError(
                    f"{name}: got {pixels}, expected at most {self.most}: the network has no "
                    "positions beyond"
                )
