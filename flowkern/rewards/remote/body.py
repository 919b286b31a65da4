"""Requests as bytes, and back: images in a safetensors blob, or as PNG or WebP in JSON.

Both are lossless: JPEG would move what a reward sees by some levels. What comes in is from anyone
who has the token: sizes are looked at before anything of that size is made.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flowkern.rewards.remote.protocol import (
    JSON,
    SAFETENSORS,
    Fields,
    Limits,
    Refused,
    Request,
    check_counts,
    read_fields,
)

Format = Literal["raw", "webp"]
ENCODERS = 4
"""Threads: Pillow leaves the interpreter while it packs."""


def encode(fields: Fields, images: Tensor, format: Format = "raw") -> tuple[str, bytes]:
    """(content type, body) of uint8 images (N, 3, H, W) or videos (N, F, 3, H, W) on the host.

    raw: 3 bytes a pixel, at once; webp: about as many of noise and a third of a photograph, in 30
    ms per 512 x 512: for a slow line.
    """
    name = "images" if images.ndim == 4 else "frames"
    # Raises ValueError for metadata that JSON does not hold, NaN included.
    tree = fields.model_dump(exclude_none=True)
    if format == "raw":
        text = json.dumps(tree, ensure_ascii=False, allow_nan=False)
        return SAFETENSORS, save({name: images.contiguous()}, metadata={"request": text})
    with ThreadPoolExecutor(ENCODERS) as pool:
        packed = list(pool.map(_to_webp, images.reshape(-1, *images.shape[-3:])))
    if images.ndim == 5:
        count = images.shape[1]
        packed = [packed[i : i + count] for i in range(0, len(packed), count)]
    return JSON, json.dumps(tree | {name: packed}, allow_nan=False).encode()


def _to_webp(image: Tensor) -> str:
    from PIL import Image

    file = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.save(file, "WEBP", lossless=True, method=0)
    return base64.b64encode(file.getvalue()).decode()


def decode(content_type: str, body: bytes, limits: Limits) -> Request:
    """Raises Refused for every body that is no request, or one beyond the limits."""
    return READERS[content_type](body, limits)


def _from_safetensors(body: bytes, limits: Limits) -> Request:
    size = int.from_bytes(body[:8], "little")
    if len(body) >= 8 and size > limits.header_bytes:
        most = f"expected at most {limits.header_bytes}"
        raise Refused(413, "too_large", f"safetensors header: got {size} bytes, {most}")
    if len(body) < 8 + size:
        raise Refused(400, "broken", f"safetensors: ends after {len(body)} bytes")
    header = _parsed(body[8 : 8 + size], "safetensors header")
    try:
        text = header["__metadata__"]["request"]
        (name,) = header.keys() - {"__metadata__"}
        dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
        is_said = isinstance(text, str) and all(type(side) is int for side in shape)
    except (KeyError, TypeError, ValueError, AttributeError):
        is_said = False
    if not is_said or name not in ("images", "frames"):
        wanted = 'expected one tensor, images or frames, and the metadata "request"'
        raise Refused(422, "wrong_field", f"safetensors: {wanted}")
    if dtype != "U8" or len(shape) != (4 if name == "images" else 5):
        wanted = "(N, 3, H, W)" if name == "images" else "(N, F, 3, H, W)"
        got = f"{dtype} of {len(shape)} dimensions"
        raise Refused(422, "wrong_shape", f"{name}: got {got}, expected U8 {wanted}")
    limits.check_shape(shape)
    fields = read_fields(_parsed(text, "request"), limits)
    check_counts(fields, shape[0])
    try:
        images = load(body)[name]
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise Refused(400, "broken", f"safetensors: {error}") from None
    return Request(fields, list(images))


def _from_json(body: bytes, limits: Limits) -> Request:
    tree = _parsed(body, "JSON")
    if not isinstance(tree, dict):
        raise Refused(422, "wrong_field", "request: expected an object")
    name = "frames" if "frames" in tree else "images"
    packed = tree.pop(name, None)
    fields = read_fields(tree, limits)
    is_video = name == "frames"
    rows = packed if is_video else [[one] for one in packed] if isinstance(packed, list) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        wanted = "a list of files in base64" if not is_video else "a list of lists of such files"
        raise Refused(422, "wrong_field", f"{name}: expected {wanted}")
    check_counts(fields, len(rows))
    if len(rows) > limits.images or max(map(len, rows)) > limits.frames:
        limits.check_shape((len(rows), max(map(len, rows)), 3, 1, 1))
    files = [[_file(one, f"{name}.{i}") for one in row] for i, row in enumerate(rows)]
    sizes = [[_size(data, f"{name}.{i}") for data in row] for i, row in enumerate(files)]
    for i, row in enumerate(sizes):
        if len(set(row)) > 1:
            raise Refused(422, "wrong_shape", f"{name}.{i}: frames of several sizes")
        limits.check_shape((1, 3, *row[0]))
    unpacked = sum(3 * width * height for row in sizes for width, height in row)
    if unpacked > limits.max_bytes:
        wanted = f"expected at most {limits.max_bytes}"
        raise Refused(413, "too_large", f"{name}: got {unpacked} bytes unpacked, {wanted}")
    images = []
    for i, (row, (size, *_)) in enumerate(zip(files, sizes, strict=True)):
        frames = [_pixels(data, size, f"{name}.{i}") for data in row]
        images.append(torch.stack(frames) if is_video else frames[0])
    return Request(fields, images)


READERS: dict[str, Callable[[bytes, Limits], Request]] = {
    SAFETENSORS: _from_safetensors,
    JSON: _from_json,
}


def _parsed(text: bytes | str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "broken", f"{what}: {type(error).__name__}: {error}") from None


def _file(text: Any, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise Refused(422, "wrong_field", f"{place}: is not base64") from None


def _size(data: bytes, place: str) -> tuple[int, int]:
    """Width and height, as its first bytes say: to open a WebP takes the memory of its pixels."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) > 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    # The simple lossless form: 14 bits each. Others are lossy, or hold more than an image.
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8L" and len(data) > 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    wanted = "PNG, or lossless WebP that holds nothing but pixels"
    raise Refused(422, "wrong_image", f"{place}: expected {wanted}")


def _pixels(data: bytes, size: tuple[int, int], place: str) -> Tensor:
    """(3, H, W) uint8 of a file that says it has this size."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as picture:
            mode = picture.mode if picture.size == size else f"the size {picture.size}"
            if mode == "RGB":
                return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    except Exception as error:  # whatever a decoder makes of a stranger's bytes
        raise Refused(422, "wrong_image", f"{place}: {type(error).__name__}: {error}") from None
    raise Refused(422, "wrong_image", f"{place}: got {mode}, expected RGB of 8 bits")
