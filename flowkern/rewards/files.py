"""Images as files of images: what a codec or a server is given. Pillow writes them, on the host."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flowkern.rewards.pixels import as_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["encoded", "pictures", "png_base64"]


def pictures(images: Tensor) -> list[Image]:
    """Images (B, 3, H, W) in [0, 1], or uint8 -> B RGB pictures. Raises ValueError as `as_bytes`,
    and for videos.
    """
    if images.ndim != 4:
        shape = tuple(images.shape)
        raise ValueError(f"images: got shape {shape}, expected (B, 3, H, W)")
    try:
        from PIL.Image import fromarray
    except ImportError as error:
        raise ValueError("needs pillow: pip install 'flowkern[train]'") from error
    return [fromarray(one) for one in as_bytes(images).permute(0, 2, 3, 1).cpu().numpy()]


def encoded(picture: Image, codec: str, **options: Any) -> bytes:
    """A file of Pillow's `codec`, with its options."""
    file = BytesIO()
    picture.save(file, codec, **options)
    return file.getvalue()


def png_base64(picture: Image) -> str:
    """Lossless, as JSON holds it: the reward sees the pixels that were drawn."""
    return base64.b64encode(encoded(picture, "PNG", compress_level=1)).decode()
