"""GenEval as a reward: a detector on a server finds what is in an image, the clauses are judged
here. docs/rewards.md has the protocol, and what a server of flow_grpo's needs to speak it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowkern.checks import finite_number, shown
from flowkern.rewards import Unscored
from flowkern.rewards.asking import ask_all, server
from flowkern.rewards.clauses import Thing, Verdict, check_clauses, judge
from flowkern.rewards.files import pictures, png_base64
from flowkern.rewards.pixels import check_layout

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GenEval"]

SCORES = {"scores": "score", "rewards": "correct", "strict_rewards": "strict"}
"""By the names that flow_grpo's server has for them."""
MOST = 16
"""Things of a class that are looked at, the surest."""
COUNTING = "counting"
"""The tag of prompts that take a surer detector: doubtful boxes would be counted."""


class GenEval:
    """How well an image has the things that its prompt asks for.

    url: of the detector; token_env: the environment variable of its token. score: "scores" (what
    flow_grpo trains on: a mean over the clauses, see `Verdict`), "rewards" (the benchmark's rule)
    or "strict_rewards". threshold, counting_threshold: how sure the detector has to be of a box,
    and of one in a prompt of the tag "counting". batch: images of a request; retries,
    request_timeout: of a request.
    """

    may_fail: ClassVar[bool] = True
    scales: ClassVar[Mapping[str, tuple[float, float]]] = {"raw": (1.0, 0.0)}
    default_scale: ClassVar[str] = "raw"

    def __init__(
        self,
        url: str,
        *,
        token_env: str | None = None,
        score: str = "scores",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        batch: int = 16,
        retries: int = 4,
        request_timeout: float | None = None,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score: got {shown(score)}, expected one of {', '.join(SCORES)}")
        thresholds = {"threshold": threshold, "counting_threshold": counting_threshold}
        for key, value in thresholds.items():
            finite_number(key, value, "0 to 1", lambda t: 0 <= t <= 1)
        finite_number("batch", batch, "a whole number above 0", lambda n: n >= 1)
        self.score, self.batch = score, batch
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.server = server(url, token_env, retries, request_timeout, max_bytes=16 * 2**20)
        self.version = "a detector that was not asked yet"

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W) in [0, 1], metadata with `include`, and if they have it `exclude` and
        `tag` -> (B,), NaN where the detector did not answer; "correct" and "strict" beside, and the
        latter per tag, "strict_colors", NaN for images of another.

        Raises ValueError for metadata without clauses, and Unscored where there was no answer at
        all.
        """
        check_layout(images, prompts)
        for i, row in enumerate(metadata):
            try:
                check_clauses(row)
            except ValueError as error:
                raise ValueError(f"{error}, in image {i}, prompt {prompts[i]!r:.80}") from None
        drawn = list(zip(pictures(images), metadata, strict=True))
        parts = [drawn[i : i + self.batch] for i in range(0, len(drawn), self.batch)]
        verdicts: list[Verdict | None] = []
        for part, answer in zip(parts, ask_all(self._judged, parts, 4), strict=True):
            verdicts += answer or [None] * len(part)

        def column(name: str) -> Tensor:
            values = [math.nan if v is None else float(getattr(v, name)) for v in verdicts]
            return torch.tensor(values, dtype=torch.float64)

        strict = column("strict")
        info = {"correct": column("correct"), "strict": strict}
        for tag in sorted({str(row["tag"]) for row in metadata if "tag" in row}):
            is_of = torch.tensor([str(row.get("tag")) == tag for row in metadata])
            info[f"strict_{tag}"] = strict.masked_fill(~is_of, torch.nan)
        return column(SCORES[self.score]), info

    def _judged(self, part: Sequence[tuple[Image, Mapping[str, Any]]]) -> list[Verdict]:
        """Of the images of one request."""
        asked = [
            {
                "png": png_base64(picture),
                "classes": sorted({c["class"] for c in _clauses(row)}),
                "colors": sorted({c["class"] for c in _clauses(row) if "color" in c}),
            }
            for picture, row in part
        ]
        answer = self.server.post("/v1/detect", json={"protocol": 1, "images": asked}).json()
        try:
            self.version = str(answer.get("version", "unknown"))
            found = answer["detections"]
            if len(found) != len(part):
                raise ValueError(f"{len(found)} lists of detections for {len(part)} images")
            return [
                judge(self._things(f, row), row) for f, (_, row) in zip(found, part, strict=True)
            ]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise Unscored(
                f"{self.server.url}: the answer is not what docs/rewards.md asks of a detector "
                f"({what:.200})"
            ) from error

    def _things(self, found: Sequence[Any], row: Mapping[str, Any]) -> dict[str, list[Thing]]:
        """The detections of an image, those that count."""
        is_counting = row.get("tag") == COUNTING
        least = self.counting_threshold if is_counting else self.threshold
        colored = {c["class"] for c in _clauses(row) if "color" in c}
        things: dict[str, list[Thing]] = {}
        for one in sorted(found, key=lambda one: -float(one["score"])):
            box = tuple(map(float, one["box"]))
            if len(box) != 4 or not all(map(math.isfinite, (*box, float(one["score"])))):
                raise ValueError(f"a detection is {shown(one)}")
            if one["class"] in colored and not isinstance(one.get("color"), str):
                raise ValueError(f"no color of a {one['class']}, which was asked for")
            if float(one["score"]) > least:
                things.setdefault(one["class"], []).append(Thing(box, one.get("color")))
        return {name: some[:MOST] for name, some in things.items()}


def _clauses(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*row["include"], *(row.get("exclude") or ())]
