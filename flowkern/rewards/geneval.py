"""GenEval as a reward: a detector on a server finds what is in an image, the clauses are judged
here. docs/rewards.md has the protocol, and what a server of flow_grpo's needs to speak it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowkern.checks import counted, finite_number, shown, whole_number
from flowkern.rewards.asking import ask_all, server, understanding
from flowkern.rewards.clauses import Thing, Verdict, check_clauses, judge
from flowkern.rewards.files import pictures, png_base64
from flowkern.rewards.frames import FrameReward
from flowkern.rewards.http import Http

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GenEval"]

GRADES = {"scores": "score", "rewards": "correct", "strict_rewards": "strict"}
"""By the names that flow_grpo's server has for them."""
MOST = 16
"""Things of a class that are looked at, the surest."""
AT_A_TIME = 4
"""Requests."""
COUNTING = "counting"
"""The tag of prompts that take a surer detector: doubtful boxes would be counted."""


@dataclass(kw_only=True, eq=False)
class GenEval(FrameReward):
    """How well an image has the things that its prompt asks for, in metadata's `include` and, if
    it has that, `exclude`; NaN where the detector did not answer. "correct" and "strict" beside,
    and the latter per `tag`, as "strict_colors".

    Raises ValueError that begins with the option at fault; called, for metadata without clauses,
    and Unscored where there was no answer at all.
    """

    may_fail: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True
    takes_bytes: ClassVar[bool] = True

    url: str
    """Of the detector."""
    token_env: str | None = None
    """The environment variable that holds its token."""
    grade: str = "scores"
    """"scores" is what flow_grpo trains on, a mean over the clauses (see `Verdict`), "rewards" the
    benchmark's rule, "strict_rewards" asks for exact numbers."""
    threshold: float = 0.3
    """How sure the detector has to be of a box."""
    counting_threshold: float = 0.9
    """The same in prompts of the tag "counting"."""
    batch: int = 16
    """Images of a request."""
    retries: int = 4
    request_timeout: float | None = None
    """Seconds of a request, its retries included; null: 60, and 3 for each MiB."""

    server: Http = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grade not in GRADES:
            got = shown(self.grade)
            raise ValueError(f"grade: got {got}, expected one of {', '.join(GRADES)}")
        for key in ("threshold", "counting_threshold"):
            finite_number(key, getattr(self, key), "0 to 1", lambda t: 0 <= t <= 1)
        whole_number("batch", self.batch)
        patience = self.retries, self.request_timeout
        self.server = server(self.url, self.token_env, *patience, max_bytes=16 * 2**20)
        self.detector: str | None = None  # what it says of itself, once it has been asked

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        for prompt, row in zip(prompts, metadata, strict=True):
            try:
                check_clauses(row)
            except ValueError as error:
                raise ValueError(f"{error}, of prompt {prompt!r:.80}") from None
        drawn = list(zip(pictures(images), prompts, metadata, strict=True))
        parts = [drawn[i : i + self.batch] for i in range(0, len(drawn), self.batch)]
        verdicts: list[Verdict | None] = []
        for part, answer in zip(parts, ask_all(self._judged, parts, AT_A_TIME), strict=True):
            verdicts += answer or [None] * len(part)

        def column(name: str) -> Tensor:
            values = [math.nan if v is None else float(getattr(v, name)) for v in verdicts]
            return torch.tensor(values, dtype=torch.float64)

        strict = column("strict")
        info = {"correct": column("correct"), "strict": strict}
        for tag in sorted({str(row["tag"]) for row in metadata if "tag" in row}):
            is_of = torch.tensor([str(row.get("tag")) == tag for row in metadata])
            info[f"strict_{tag}"] = strict.masked_fill(~is_of, torch.nan)
        return column(GRADES[self.grade]), info

    def _judged(self, part: Sequence[tuple[Image, str, Mapping[str, Any]]]) -> list[Verdict]:
        """The images of one request. Raises Unscored where there is no answer, or another one."""
        asked = [
            {
                "png": png_base64(picture),
                "classes": sorted({c["class"] for c in _clauses(row)}),
                "colors": sorted({c["class"] for c in _clauses(row) if "color" in c}),
                "row": {"prompt": prompt} | dict(row),
            }
            for picture, prompt, row in part
        ]
        answer = self.server.post("/v1/detect", json={"protocol": 1, "images": asked}).json()
        with understanding(self.server, "a detector"):
            self.detector = str(answer.get("version", "unknown"))
            found = answer["verdicts" if "verdicts" in answer else "detections"]
            if len(found) != len(part):
                raise ValueError(f"answers for {len(found)} of {counted(len(part), 'image')}")
            if "verdicts" in answer:
                return [_graded(one) for one in found]
            return [
                judge(self._things(f, row), row) for f, (_, _, row) in zip(found, part, strict=True)
            ]

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


def _graded(one: Mapping[str, Any]) -> Verdict:
    """What a server judged by itself."""
    score = float(one["score"])
    if not math.isfinite(score):
        raise ValueError(f"a score is {score}")
    return Verdict(score, bool(one["correct"]), bool(one["strict"]))


def _clauses(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*row["include"], *(row.get("exclude") or ())]
