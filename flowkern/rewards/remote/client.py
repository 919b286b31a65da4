"""A reward that runs elsewhere, as `flowkern serve-reward` serves it."""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor

from flowkern.checks import counted, shown
from flowkern.lookup import nearest
from flowkern.rewards import RewardError, Unscored, Values
from flowkern.rewards.asking import server
from flowkern.rewards.frames import frame_numbers, require_frames
from flowkern.rewards.pixels import as_bytes, check_layout
from flowkern.rewards.remote.body import encode
from flowkern.rewards.remote.protocol import PROTOCOL, About, Answer, Fields, first_of
from flowkern.web import line

__all__ = ["RemoteReward"]

FORMATS = ("raw", "webp")
START_S = 30.0
"""That a server has to say what it serves, before a run begins."""


class RemoteReward:
    """Scores of a reward at a server; images go as they are, in 8 bits a channel.

    name: of the reward there. url: http://HOST:PORT. token_env: the environment variable that holds
    its token; None: it asks for none. request_timeout: seconds of a request, its retries included;
    None: 60, and 3 per MiB that is sent. retries: attempts after the first. batch: images of a
    request.
    format: raw, 3 bytes a pixel, or webp, which is lossless, too, for a slow line. frames: of a
    video, so many are sent, evenly spaced from the first to the last, or "all";
    metadata["fps"] goes with them.

    The server is asked at once for what it serves: ValueError names the option that does not fit.
    Images that it cannot score are NaN, and a warning says why; a request without an answer raises
    Unscored, what the server refuses RewardError.
    """

    may_fail: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True
    """Many threads may call it."""
    takes_bytes: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        *,
        url: str,
        token_env: str | None = None,
        request_timeout: float | None = None,
        retries: int = 4,
        batch: int = 32,
        format: str = "raw",
        frames: int | str = 8,
    ) -> None:
        _require("batch", batch, "1 to 256", type(batch) is int and 1 <= batch <= 256)
        _require("format", format, " or ".join(FORMATS), format in FORMATS)
        require_frames(frames)
        self.name, self.batch, self.format, self.frames = name, batch, format, frames
        self.server = server(url, token_env, retries, request_timeout)
        self._begin()

    def _begin(self) -> None:
        """Learn what there is to know of the reward; raises ValueError where there is none."""
        where = self.server.url
        found = self.server.get("/v1/info", timeout=START_S, retries=2).json()
        try:
            about = About.model_validate(found)
        except ValidationError as error:
            raise ValueError(f"url: {where} serves no rewards: {first_of(error)}") from None
        if PROTOCOL not in about.protocol:
            spoken = ", ".join(map(str, about.protocol))
            raise ValueError(f"url: {where} speaks protocol {spoken}; expected {PROTOCOL}")
        if self.name not in about.rewards:
            near = nearest(self.name, about.rewards)
            hint = f"; did you mean {near!r}?" if near else ""
            served = ", ".join(about.rewards)
            raise ValueError(f"name: got {self.name!r}, but {where} serves {served}{hint}")
        reward = about.rewards[self.name]
        self.version, self.takes_group = reward.version, reward.takes_group
        self.scales, self.default_scale = reward.scales, reward.default_scale
        self.batch, self.max_bytes = min(self.batch, about.limits.images), about.limits.max_bytes

    @property
    def served(self) -> dict[str, str]:
        """What is scored with, for `require_served` of a later process."""
        return {"name": self.name, "version": self.version}

    def require_served(self, before: Mapping[str, str]) -> None:
        """Raise ValueError where a reward of that name is another than it was."""
        if before["name"] == self.name and before["version"] != self.version:
            raise ValueError(_became(self.server.url, self.name, self.version, before["version"]))

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        *,
        group: Sequence[int] | None = None,
    ) -> tuple[Values, Mapping[str, Values]]:
        """images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] -> (B,) float64 and what the
        reward reports beside. group: (B,) int, where the reward takes it."""
        check_layout(images, prompts)
        rows = [dict(one) for one in metadata]
        if images.ndim == 5:
            images, rows = self._sampled(images, rows)
        pixels = as_bytes(images).cpu()
        scores = torch.full((len(pixels),), math.nan, dtype=torch.float64)
        info: dict[str, Tensor] = {}
        reasons: list[str] = []
        ids = None if group is None else [int(one) for one in group]
        for places in self._requests(pixels, ids):
            fields = Fields(
                protocol=PROTOCOL,
                request_id=uuid.uuid4().hex,
                rewards=[self.name],
                prompts=[prompts[i] for i in places],
                metadata=[rows[i] for i in places],
                group=[ids[i] for i in places] if ids is not None and self.takes_group else None,
            )
            found, beside, why = self._ask(fields, pixels[places])
            scores[places] = found
            reasons += why
            for entry, values in beside.items():
                info.setdefault(entry, torch.full_like(scores, math.nan))[places] = values
        if count := int(scores.isnan().sum()):
            reasons = reasons or ["the server does not say why"]
            of = f"{count} of {counted(len(scores), 'image')}"
            said = f"{self.name} at {self.server.url}: no score for {of}"
            warnings.warn(f"{said}: {line(reasons[0], 200)}", stacklevel=2)
        return scores, info

    def _sampled(
        self, videos: Tensor, metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Frames that are sent; of fewer frames in the same time, there are fewer in a second."""
        count = videos.shape[1]
        numbers = frame_numbers(count, self.frames)
        if len(numbers) == count:
            return videos, metadata
        share = (len(numbers) - 1) / (count - 1) if numbers[1:] else 1 / count
        slower = [one | {"fps": one["fps"] * share} if "fps" in one else one for one in metadata]
        return videos[:, numbers], slower

    def _requests(self, pixels: Tensor, group: Sequence[int] | None) -> Iterator[list[int]]:
        """Places of images that go together: within the server's limits, groups whole."""
        room = self.max_bytes * 3 // 4 // max(1, pixels[0].numel())  # base64, and what is said
        most = max(1, min(self.batch, room))
        if group is None or not self.takes_group:
            every = list(range(len(pixels)))
            yield from (every[i : i + most] for i in range(0, len(every), most))
            return
        members: dict[int, list[int]] = {}
        for i, one in enumerate(group):
            members.setdefault(one, []).append(i)
        places: list[int] = []
        for one in members.values():
            if places and len(places) + len(one) > most:
                yield places
                places = []
            places += one
        yield places

    def _ask(
        self, fields: Fields, pixels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Sequence[str]]:
        """(scores, what else, reasons of those that are missing) of one request.

        Raises Unscored for an answer that is none.
        """
        kind, body = encode(fields, pixels, self.format)
        headers = {"content-type": kind, "flowkern-protocol": str(PROTOCOL)}
        headers["idempotency-key"] = fields.request_id
        answer = self.server.post("/v1/score", content=body, headers=headers)
        count, said = len(pixels), answer.json()
        try:
            reply = Answer.model_validate(said)
            if reply.request_id != fields.request_id:
                raise ValueError("is of another request")
            scores = _numbers(reply.rewards[self.name], count, "scores")
            beside = reply.info.get(self.name, {})
            info = {entry: _numbers(values, count, entry) for entry, values in beside.items()}
            version = reply.versions[self.name]
        except (ValueError, KeyError) as error:
            what = f"has {first_of(error)}" if isinstance(error, ValidationError) else error
            what = f"lacks {error}" if isinstance(error, KeyError) else what
            raise Unscored(f"{answer.url}: the answer {line(str(what), 200)}") from error
        if version != self.version:
            raise RewardError(_became(answer.url, self.name, version, self.version))
        return scores, info, [one.message for one in reply.errors]


def _became(where: str, name: str, now: str, before: str) -> str:
    return (
        f"{where}: {name} is {now!r:.80} now and was {before!r:.80}: scores of the two are not of "
        "one reward"
    )


def _numbers(values: Sequence[float | None], count: int, what: str) -> Tensor:
    """(count,) float64, NaN for what is no number."""
    if len(values) != count:
        raise ValueError(f"has {len(values)} {what:.40}; expected {count}, one per image")
    numbers = [math.nan if value is None else value for value in values]
    return torch.tensor([x if math.isfinite(x) else math.nan for x in numbers], dtype=torch.float64)


def _require(option: str, value: Any, wanted: str, is_right: bool) -> None:
    if not is_right:
        raise ValueError(f"{option}: got {shown(value)}, expected {wanted}")
