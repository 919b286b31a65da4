"""What a run leaves for people: sample grids, reward curves."""

from __future__ import annotations

import resource
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a name of a picture is refused before torch is there
    import torch
    from torch import Tensor

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4"}
ENCODING: dict[str, dict[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}
MOVING, ONLY_MOVING = {"png", "webp", "mp4"}, {"mp4"}
SHOWN_FRAMES = 4  # of a video, in a grid
DRAWN = {"Cs": "\ufffd", **dict.fromkeys(("Cc", "Cf", "Zl", "Zp"), " ")}
"""Instead of letters of these categories: halves of surrogate pairs, and what only steers."""
INK, ACCENT, SOFT = "#222222", "#1f5fa8", "#d9822b"


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory allocated on a CUDA device; else of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, lists as text: what trackers take for hyperparameters."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            out[prefix + key] = value if plain else str(value)
    return out


def picture_format(path: Path, key: str = "path", is_video: bool | None = False) -> str:
    """What a picture of this name, which the user gave as `key`, is written as; is_video: None
    where that is not known yet.

    Raises ValueError for a name that does not end in .png, .webp, .jpg or .jpeg, or of a video in
    .png, .webp or .mp4; ImportError where .mp4 lacks what it takes.
    """
    found = FORMATS.get(path.suffix.lower())
    if is_video and found not in MOVING:
        wanted = ".png, .webp or .mp4"
        raise ValueError(f"{key}: got {str(path)!r} for a video, expected a name in {wanted}")
    if found is None or (found in ONLY_MOVING and is_video is False):
        what = "" if found is None else " for what does not move"
        wanted = ".png, .webp, .jpg or .jpeg"
        raise ValueError(f"{key}: got {str(path)!r}{what}, expected a name in {wanted}")
    if found in ONLY_MOVING and find_spec("av") is None:
        raise ImportError(f"{key}: .mp4 takes PyAV: pip install 'flowkern[video]'", name="av")
    return found


def save_image(path: Path, image: Tensor, frame_rate: float | None = None) -> None:
    """One image (3, H, W) in [0, 1], or a video (F, 3, H, W) at so many frames per second, that
    plays again and again. As PNG, pixel for pixel, as WebP, JPEG (images) or MP4 (videos), by the
    path's suffix.
    """
    from PIL import Image

    pixels = _pixels(image).mul(255).round().byte()
    frames = pixels if frame_rate else pixels[None]
    if frame_rate and picture_format(path, is_video=True) in ONLY_MOVING:
        return _save(lambda file, _: save_movie(file, frames, frame_rate), path, is_video=True)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    options: dict[str, Any] = {}
    if frame_rate:
        options = {"save_all": True, "append_images": pictures[1:], "loop": 0}
        options["duration"] = 1000 / frame_rate
    _save(lambda file, kind: pictures[0].save(file, kind, **ENCODING[kind], **options), path)


def save_movie(path: Path, frames: Tensor, frame_rate: float) -> None:
    """Frames (F, 3, H, W) uint8 as H.264 in an MP4; an odd side loses its last pixel."""
    import av

    height, width = (side // 2 * 2 for side in frames.shape[-2:])
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames[..., :height, :width].permute(0, 2, 3, 1).contiguous().numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def few_frames(images: Tensor) -> Tensor:
    """Videos (B, F, 3, H, W) as a grid shows them, by a few frames from the first to the last;
    images as they are.
    """
    if images.ndim == 4:
        return images
    frames = images.shape[1]
    return images[:, _evenly(frames, min(SHOWN_FRAMES, frames))]


def _evenly(frames: int, count: int) -> list[int]:
    return [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]


def save_grid(
    path: Path,
    images: Tensor,
    captions: Sequence[str],
    scores: Sequence[float] = (),
    title: str = "",
    columns: int | None = None,
) -> None:
    """Images (B, 3, H, W) in [0, 1], or videos (B, F, 3, H, W), of which a few frames are shown
    side by side, with a caption and a score under each, as PNG, WebP or JPEG by the path's suffix.
    Text of any kind is drawn as it stands, cut to what there is room for. columns: None: as many as
    there is room for.
    """
    from matplotlib.figure import Figure

    images, wide = few_frames(images), 1
    if images.ndim == 5:
        wide = images.shape[1]
        images = images.permute(0, 2, 3, 1, 4).flatten(3)
    if columns is None:
        columns = min(len(images), max(1, (10 if len(images) > 24 else 5) // wide))
    rows = -(-len(images) // columns)
    texts = [_wrapped(caption, 26 * wide, lines=3) for caption in captions]
    lines = max(text.count("\n") + 1 for text in texts) + bool(scores)
    across = 1.5 * wide
    cell = across + 0.3
    title = _wrapped(title, int(10 * cell * columns), lines=4)
    head = 0.3 + 0.2 * (title.count("\n") + 1) if title else 0.1
    height = 1.5 + 0.17 * lines + 0.12  # of a cell, in inches
    size = (cell * columns, height * rows + head)
    figure = Figure(figsize=size, dpi=110, facecolor="white")
    grid = _pixels(images).permute(0, 2, 3, 1).numpy()
    for i, text in enumerate(texts):
        row, column = divmod(i, columns)
        left, top = cell * column + 0.15, size[1] - head - height * row
        box = (left / size[0], (top - 1.5) / size[1], across / size[0], 1.5 / size[1])
        axes = figure.add_axes(box)
        axes.imshow(grid[i], interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#bbbbbb")
        place = {"ha": "center", "va": "top", "parse_math": False}
        middle = (left + across / 2) / size[0]
        figure.text(middle, (top - 1.55) / size[1], text, fontsize=8, color=INK, **place)
        if scores:
            below = (top - 1.55 - 0.17 * (text.count("\n") + 1)) / size[1]
            score = f"{scores[i]:.2f}" if abs(scores[i]) < 1e6 else f"{scores[i]:.4g}"
            figure.text(middle, below, score, fontsize=9, color=ACCENT, weight="bold", **place)
    if title:
        figure.text(0.5, 1 - 0.12 / size[1], title, fontsize=11, color=INK, **place)
    _save_figure(figure, path)


def save_curves(
    path: Path, metrics: Sequence[dict], validation: Sequence[dict], optimized: Collection[str]
) -> None:
    """A PNG with one panel per reward: training rollouts as a line, held-out prompts as dots.

    Records of another kind, and values that are no numbers, are passed over.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rollouts = [record for record in metrics if "reward/mean" in record]
    keys = dict.fromkeys(key for record in rollouts for key in record)  # resumed, it may have more
    names = [key for key in keys if key.startswith("reward/")]
    if len(optimized) == 1:
        names = [name for name in names if name != "reward/mean"]  # it is that reward, weighted
    if not names:
        return
    figure = Figure(figsize=(4.2 * len(names), 3.4), dpi=110, facecolor="white")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        drawn, held_out = _points(rollouts, name), _points(validation, name)
        axes.plot(*zip(*drawn, strict=True), color=ACCENT, lw=1.6, label="training rollouts")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", color=SOFT, ms=5, label="held-out prompts")
        values = [value for _, value in (*drawn, *held_out)]
        if values and 0 <= min(values) <= max(values) - 0.1 <= 0.9:
            axes.set_ylim(0, 1.02)
        reward = name.removeprefix("reward/")
        role = "optimized" if reward in (*optimized, "mean") else "reported only"
        title = f"{_wrapped(reward.replace('_', ' '), 30, lines=1)} ({role})"
        axes.set_title(title, fontsize=11, color=INK, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    _save_figure(figure, path, tight=True)


def _points(records: Sequence[dict], name: str) -> list[tuple[float, float]]:
    found = [(record["step"], record.get(name)) for record in records]
    are_numbers = [isinstance(value, int | float) and abs(value) < 1e300 for _, value in found]
    return [point for point, is_number in zip(found, are_numbers, strict=True) if is_number]


def _pixels(images: Tensor) -> Tensor:
    """On the host, in [0, 1]; what is not a number is black."""
    return images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1)


def _wrapped(text: str, width: int, lines: int) -> str:
    """`text` in so many lines of so many letters, of characters that can be drawn."""
    letters = [DRAWN.get(unicodedata.category(letter), letter) for letter in text[:1000]]
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in letters)
    width = width * len(letters) // (len(letters) + wide) if letters else width
    found = textwrap.wrap("".join(letters), width)
    if len(found) > lines:
        found[lines - 1] = found[lines - 1][: width - 2].rstrip() + " …"
    return "\n".join(found[:lines])


def _save_figure(figure, path: Path, tight: bool = False) -> None:
    with warnings.catch_warnings():
        # A font lacks some of the world's letters, and draws a box: the picture says it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        if tight:
            figure.tight_layout()
        _save(lambda file, kind: figure.savefig(file, format=kind, pil_kwargs=ENCODING[kind]), path)


def _save(write: Callable[[Path, str], None], path: Path, is_video: bool = False) -> None:
    """Through a second name, so that a reader never sees half a picture."""
    kind = picture_format(path, is_video=is_video)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial, kind)
        partial.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
