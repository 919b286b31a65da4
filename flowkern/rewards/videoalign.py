"""VideoAlign's reward of videos (arXiv 2501.13918), by a model on a server: how they look, move and
follow the prompt. docs/rewards.md has the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowkern.checks import finite_number, shown, whole_number
from flowkern.rewards.asking import ask_all, server, understanding
from flowkern.rewards.files import pictures, png_base64
from flowkern.rewards.http import Http
from flowkern.rewards.pixels import as_bytes, check_layout

__all__ = ["VideoAlign", "sampled"]

DIMENSIONS = ("VQ", "MQ", "TA")
"""Visual quality, motion quality, text alignment."""
LEAST, MOST, EVEN = 4, 768, 2
"""Frames of a video, and of how many it takes a multiple: two make a patch."""
RATE = 2.0
"""Frames of a second, as the model was trained."""


def sampled(count: int, fps: float) -> list[int]:
    """Which of `count` frames of a video the model sees: 2 of a second, at least 4 if there are so
    many, an even number, evenly from the first to the last. None of a single frame.
    """
    wanted = min(max(count / fps * RATE, LEAST), min(MOST, count) // EVEN * EVEN)
    number = round(wanted / EVEN) * EVEN
    return torch.linspace(0, count - 1, number, dtype=torch.float64).round().long().tolist()


@dataclass(kw_only=True, eq=False)
class VideoAlign:
    """The sum of the model's values, each less its mean over the training data, by its deviation;
    each by itself beside, as "VQ", "MQ" and "TA". NaN where the server did not answer, and for a
    video of one frame.

    Raises ValueError that begins with the option at fault; called, for images, for a video without
    frames a second, and Unscored where no video had an answer.
    """

    may_fail: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True
    takes_bytes: ClassVar[bool] = True
    scales: ClassVar[Mapping[str, tuple[float, float]]] = {"raw": (1.0, 0.0)}
    default_scale: ClassVar[str] = "raw"

    url: str
    """Of the server."""
    token_env: str | None = None
    """The environment variable that holds its token."""
    dimensions: Any = DIMENSIONS
    """What is summed; [VQ, MQ] is what DanceGRPO trains on, as TA was unstable there."""
    fps: float | None = None
    """Frames of a second of all videos; null: each has it in metadata["fps"]. Another one than the
    video has gives low scores to good ones."""
    concurrency: int = 4
    """Requests at a time; each has one video."""
    retries: int = 4
    request_timeout: float | None = None
    """Seconds of a request, its retries included; null: 60, and 3 for each MiB."""

    server: Http = field(init=False, repr=False)

    def __post_init__(self) -> None:
        named = [self.dimensions] if isinstance(self.dimensions, str) else self.dimensions
        if not isinstance(named, list | tuple) or not named or set(named) - set(DIMENSIONS):
            got = shown(self.dimensions)
            raise ValueError(f"dimensions: got {got}, expected some of {', '.join(DIMENSIONS)}")
        self.dimensions = list(dict.fromkeys(named))
        if self.fps is not None:
            finite_number("fps", self.fps, "a number above 0", lambda fps: fps > 0)
        whole_number("concurrency", self.concurrency)
        self.server = server(self.url, self.token_env, self.retries, self.request_timeout)
        self.model: str | None = None  # what the server says of itself, once it has been asked

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """videos (B, F, 3, H, W) in [0, 1], or uint8 -> (B,) and what stands beside, (B,) each."""
        check_layout(images, prompts)
        if images.ndim != 5:
            got = tuple(images.shape)
            raise ValueError(f"images: got shape {got}, expected videos (B, F, 3, H, W)")
        rows = metadata or [{} for _ in prompts]
        rates = [self._rate(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        values = torch.full((len(images), len(DIMENSIONS)), math.nan, dtype=torch.float64)
        if images.shape[1] > 1:
            items = list(zip(images, prompts, rates, strict=True))
            for i, answer in enumerate(ask_all(self._asked, items, self.concurrency)):
                if answer is not None:
                    values[i] = torch.tensor(answer, dtype=torch.float64)
        chosen = [DIMENSIONS.index(name) for name in self.dimensions]
        beside = dict(zip(DIMENSIONS, values.unbind(1), strict=True))
        return values[:, chosen].sum(1), beside

    def _rate(self, row: Mapping[str, Any], prompt: str) -> float:
        """Frames of a second."""
        fps = row.get("fps", self.fps)
        wanted = f"frames of a second, above 0, or the option fps; of prompt {prompt!r:.80}"
        return finite_number("metadata['fps']", fps, wanted, lambda value: value > 0)

    def _asked(self, item: tuple[Tensor, str, float]) -> list[float]:
        """The normalised values of a video. Raises Unscored for an answer without them."""
        video, prompt, fps = item
        places = sampled(len(video), fps)
        frames = [png_base64(one) for one in pictures(as_bytes(video[places]))]
        rate = len(places) / len(video) * fps
        body = {"protocol": 1, "prompt": prompt, "fps": rate, "frames": frames}
        answer = self.server.post("/v1/videoalign", json=body).json()
        with understanding(self.server, "VideoAlign"):
            told, values = answer["inference_config"], []
            for name in DIMENSIONS:
                std = float(told[f"{name}_std"])
                values.append((float(answer["logits"][name]) - float(told[f"{name}_mean"])) / std)
            if (
                not all(map(math.isfinite, values))
                or min(told[f"{n}_std"] for n in DIMENSIONS) <= 0
            ):
                raise ValueError(f"values are {values}")
            self.model = str(answer.get("version", "unknown"))
            return values
