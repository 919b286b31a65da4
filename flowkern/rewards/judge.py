"""A vision-language model as a judge, behind any server that speaks OpenAI's chat completions:
vLLM, SGLang, a vendor's. docs/rewards.md has the options of UnifiedReward and others.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowkern.checks import finite_number, shown, whole_number
from flowkern.rewards import Unscored
from flowkern.rewards.answers import expected_value, stated_score
from flowkern.rewards.asking import ask_all, server
from flowkern.rewards.files import pictures, png_base64
from flowkern.rewards.frames import FrameReward
from flowkern.rewards.http import Http
from flowkern.web import line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["VlmJudge"]

ANSWERS = ("text", "logprob", "yes_no")
LIMITS = ("max_tokens", "max_completion_tokens")
YES_NO = {"yes": 1.0, "no": 0.0}
READ_BY = {
    "labels": ("text",),
    "levels": ("logprob",),
    "low": ("text", "logprob"),
    "high": ("text", "logprob"),
    "min_probability": ("logprob", "yes_no"),
    "top_logprobs": ("logprob", "yes_no"),
}
"""Options that not every answer reads: with another one they would do nothing, and are refused."""
OWN = ("model", "messages", *LIMITS, "temperature", "logprobs", "top_logprobs", "stream")
"""What extra_body may not say: it would take the place of an option, or of what is read."""
MOST_PIXELS = 8192


@dataclass(kw_only=True, eq=False)
class VlmJudge(FrameReward):
    """What a judge makes of an image and its caption, on the scale of the answer.

    answer: "text" reads the number behind a label; "logprob" is the mean of a score under the
    probabilities of the first token, which tells images apart that get the same score; "yes_no" is
    the probability of yes. Both ask for one token. NaN where there was no answer or it cannot be
    read; "unread" beside: 1 for the latter.

    Raises ValueError that begins with the option at fault; called, Unscored where no image had an
    answer.
    """

    may_fail: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True
    takes_bytes: ClassVar[bool] = True
    scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "raw": (1.0, 0.0),
        "flow_grpo": (1 / 5, 0.0),
        "verl_omni": (1 / 4, -1 / 4),
        "flow_factory": (1 / 3, -1 / 3),
    }
    """Of UnifiedReward: a fifth of 1 to 5, and 1 to 5 as 0 to 1; of RationalRewards, 1 to 4 as
    0 to 1."""

    url: str
    """As OpenAI's clients take it, with its /v1."""
    model: str
    """What the server calls it."""
    prompt_file: str
    """The text beside the image, from a file."""
    placeholder: str | None = "{prompt}"
    """What in the text stands for the caption; null: the judge does not see it."""
    answer: str = "text"
    labels: Any = ("Final Score",)
    """Before the number in the text; of several the mean."""
    low: float = 1.0
    high: float = 5.0
    """What a score may be; beyond it is no score."""
    levels: Mapping[str, float] | None = None
    """Of logprob: token -> score, {excellent: 5, good: 4, ...}; null: the digits low to high."""
    min_probability: float = 0.5
    """What these tokens must have of the probability."""
    top_logprobs: int = 20
    """Likeliest tokens to ask for; servers have a limit, OpenAI's 20."""
    max_tokens: int | None = None
    """Of the answer; null: 1, and of a text 1024."""
    max_tokens_key: str = "max_tokens"
    """max_completion_tokens for models that refuse the other."""
    temperature: float | None = 0.0
    """null: not sent, for models that take none."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Sent with every request, as {seed: 1} or what a server has of its own."""
    size: int | None = None
    """Images are resized to a square of so many pixels (Pillow, bicubic), as flow_grpo does for
    UnifiedReward; null: sent as they are."""
    token_env: str | None = None
    """The environment variable that holds the token."""
    concurrency: int = 16
    """Requests at a time; each has one image."""
    retries: int = 4
    request_timeout: float | None = None
    """Seconds of a request, its retries included; null: 60, and 3 for each MiB."""

    server: Http = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (("answer", ANSWERS), ("max_tokens_key", LIMITS))
        for key, known in choices:
            if getattr(self, key) not in known:
                got = shown(getattr(self, key))
                raise ValueError(f"{key}: got {got}, expected one of {', '.join(known)}")
        for key in ("concurrency", "top_logprobs", "max_tokens", "size"):
            if getattr(self, key) is not None:
                whole_number(key, getattr(self, key))
        if self.size is not None and self.size > MOST_PIXELS:
            raise ValueError(f"size: got {shown(self.size)}, expected at most {MOST_PIXELS}")
        if self.temperature is not None:
            finite_number("temperature", self.temperature, "0 or more, or null", lambda t: t >= 0)
        finite_number("min_probability", self.min_probability, "0 to 1", lambda p: 0 <= p <= 1)
        finite_number("low", self.low, "a number", lambda _: True)
        finite_number("high", self.high, f"more than low, {self.low}", lambda high: high > self.low)
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model: got {shown(self.model)}, expected what the server calls it")
        if self.placeholder is not None and not self.placeholder.strip():
            raise ValueError(f"placeholder: got {self.placeholder!r}, expected what is in the text")
        self._require_sendable()
        named = [self.labels] if isinstance(self.labels, str) else self.labels
        is_named = isinstance(named, list | tuple) and len(named) > 0
        if not is_named or not all(isinstance(one, str) and one.strip() for one in named):
            raise ValueError(f"labels: got {shown(self.labels)}, expected words before a number")
        self.labels = tuple(named)
        self._require_read()
        self._values = self._meanings()
        self._text = self._read_prompt()
        self.server = server(self.url, self.token_env, self.retries, self.request_timeout)

    def _require_sendable(self) -> None:
        """Raise ValueError for an extra_body that is no JSON, or says what others say."""
        if not isinstance(self.extra_body, Mapping):
            raise ValueError(f"extra_body: got {shown(self.extra_body)}, expected a mapping")
        for key in OWN:
            if key in self.extra_body:
                raise ValueError(f"extra_body: has {key}, which is not its to say")
        try:
            json.dumps(dict(self.extra_body), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"extra_body: cannot be sent as JSON: {error}") from None

    def _require_read(self) -> None:
        """Raise ValueError for an option that `answer` does not read."""
        defaults = {one.name: one.default for one in fields(self)}
        given = [key for key in READ_BY if getattr(self, key) != defaults[key]]
        for key in given:
            if self.answer not in READ_BY[key]:
                readers = " and ".join(READ_BY[key])
                raise ValueError(f"{key}: only answer: {readers} reads it; it is {self.answer}")
        if "levels" in given and {"low", "high"} & set(given):
            raise ValueError(f"{given[1]}: is not read beside levels, which say the scores")

    def _meanings(self) -> dict[str, float]:
        """Token -> score, of answers that are one token."""
        if self.answer == "yes_no":
            return YES_NO
        if self.levels is None:
            digits = range(math.ceil(self.low), math.floor(self.high) + 1)
            is_one_token = digits and 0 <= digits[0] <= digits[-1] <= 9
            if self.answer == "logprob" and not is_one_token:
                raise ValueError("levels: missing; low to high are no single digits, 0 to 9")
            return {str(digit): float(digit) for digit in digits}
        if not isinstance(self.levels, Mapping) or len(self.levels) < 2:
            got = shown(self.levels)
            raise ValueError(f"levels: got {got}, expected {{token: score}} of at least two")
        return {
            str(token).strip().lower(): finite_number("levels", value, "numbers", lambda _: True)
            for token, value in self.levels.items()
        }

    def _read_prompt(self) -> str:
        try:
            text = Path(self.prompt_file).read_text("utf-8")
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"prompt_file: {self.prompt_file!r} cannot be read: {error}"
            ) from error
        if self.placeholder is not None and self.placeholder not in text:
            raise ValueError(
                f"prompt_file: {self.prompt_file!r} has no {self.placeholder}, where the caption "
                "goes; placeholder: null for a judge that does not see it"
            )
        return text

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        items = list(zip(pictures(images), prompts, strict=True))
        answers = ask_all(self._asked, items, self.concurrency)
        scores = [math.nan if answer is None else answer[0] for answer in answers]
        unread = [a[1] for a in answers if a is not None and math.isnan(a[0])]
        if unread:
            warnings.warn(
                f"{self.model}: {len(unread)} of {len(answers)} answers have no score that can be "
                f"read, the first: {line(unread[0], 160)!r}",
                stacklevel=2,
            )
        is_unread = [math.nan if a is None else float(math.isnan(a[0])) for a in answers]
        values = torch.tensor([scores, is_unread], dtype=torch.float64)
        return values[0], {"unread": values[1]}

    def _asked(self, item: tuple[Image, str]) -> tuple[float, str]:
        """The score of an image, NaN for none, and what the judge said."""
        answer = self.server.post("/chat/completions", json=self.request(*item)).json()
        try:
            choice = answer["choices"][0]
            if self.answer == "text":
                said = choice["message"]["content"] or ""
                return stated_score(said, self.labels, self.low, self.high), said
            place = _first_word(choice["logprobs"]["content"])
            top = [(one["token"], float(one["logprob"])) for one in place["top_logprobs"]]
            return expected_value(top, self._values, self.min_probability), place["token"]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            lacks = "text" if self.answer == "text" else "log-probabilities"
            raise Unscored(
                f"{self.server.url}: the answer of {self.model} has no {lacks} "
                f"({type(error).__name__}: {line(str(error), 80)})"
            ) from error

    def request(self, picture: Image, caption: str) -> dict[str, Any]:
        """What is sent for an image."""
        if self.size is not None:
            picture = picture.resize((self.size, self.size))
        # By replace: a text may have braces of its own.
        text = self._text
        if self.placeholder is not None:
            text = text.replace(self.placeholder, caption)
        is_text = self.answer == "text"
        content = [
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{png_base64(picture)}"},
            },
            {"type": "text", "text": text},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            self.max_tokens_key: self.max_tokens or (1024 if is_text else 1),
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if not is_text:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return body | dict(self.extra_body)


def _first_word(places: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first token that is not space alone; raises LookupError for none."""
    for place in places:
        if place["token"].strip():
            return place
    raise LookupError("no token")
