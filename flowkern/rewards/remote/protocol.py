"""What both sides of a remote reward say to each other: version 1 (docs/rewards.md).

POST /v1/score    images and prompts -> one score per image and reward
GET  /v1/info     rewards, limits, versions
GET  /healthz     is it alive? without a token
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

PROTOCOL = 1
SAFETENSORS = "application/vnd.flowkern.score+safetensors"
JSON = "application/json"
MIB = 2**20


class Refused(Exception):
    """A request that is not answered with scores: the status, a code for programs, a line."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Limits:
    """Of one request; `max_bytes` of its body, and of its images when they are unpacked."""

    max_bytes: int = 256 * MIB
    header_bytes: int = MIB
    """Of a safetensors body: its names, prompts and metadata."""
    images: int = 256
    frames: int = 256
    side: int = 4096
    prompt_bytes: int = 8192

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise Refused for images (N, 3, H, W) or frames (N, F, 3, H, W) that are not, or are too
        many or too large."""
        wanted = "(N, 3, H, W)" if len(shape) == 4 else "(N, F, 3, H, W)"
        if len(shape) not in (4, 5) or shape[-3] != 3 or min(shape) < 1:
            raise Refused(422, "wrong_shape", f"images: got {shape}, expected {wanted}")
        limits = {"images": shape[0], "side": max(shape[-2:])}
        if len(shape) == 5:
            limits["frames"] = shape[1]
        for name, got in limits.items():
            most = getattr(self, name)
            if got > most:
                raise Refused(422, "too_large", f"{name}: got {got}, expected at most {most}")


class Fields(BaseModel):
    """Of a request, all but its images."""

    model_config = ConfigDict(strict=True, extra="forbid")

    protocol: Literal[1]
    request_id: str = ""
    """Said back."""
    rewards: list[str]
    prompts: list[str]
    metadata: list[dict[str, Any]] | None = None
    """Of each image; None: {} of all."""
    group: list[int] | None = None
    """Equal of the images of one prompt."""


class Answer(BaseModel):
    """Of a request: by reward, a number per image, or null; and why."""

    model_config = ConfigDict(strict=True)

    protocol: Literal[1]
    request_id: str
    rewards: dict[str, list[float | None]]
    info: dict[str, dict[str, list[float | None]]]
    """By reward and entry."""
    errors: list[Missing]
    versions: dict[str, str]
    """Of each reward."""


class Missing(BaseModel):
    """A score that there is not."""

    index: int
    reward: str
    code: str
    message: str


class About(BaseModel):
    """Of /v1/info, what a client needs."""

    protocol: list[int]
    rewards: dict[str, AboutReward]
    limits: AboutLimits


class AboutReward(BaseModel):
    version: str
    takes_group: bool
    scales: dict[str, tuple[float, float]]
    default_scale: str | None


class AboutLimits(BaseModel):
    images: int
    max_bytes: int


@dataclass(frozen=True)
class Request:
    """Checked: as many prompts, metadata and group ids as images."""

    fields: Fields
    images: list[Tensor] = field(repr=False)
    """uint8 (3, H, W) each, of any sizes, or (F, 3, H, W)."""

    @property
    def metadata(self) -> list[dict[str, Any]]:
        return self.fields.metadata or [{} for _ in self.images]


def first_of(error: ValidationError) -> str:
    """The first field that is wrong, and how."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"


def read_fields(tree: Any, limits: Limits) -> Fields:
    """Raises Refused, naming the first field that is wrong."""
    try:
        fields = Fields.model_validate(tree)
    except ValidationError as error:
        raise Refused(422, "wrong_field", first_of(error)) from None
    try:
        longest = max((len(text.encode()) for text in fields.prompts), default=0)
    except UnicodeEncodeError:  # JSON can write it, and no tokenizer takes it
        raise Refused(422, "wrong_field", "prompts: half of a surrogate pair") from None
    if longest > limits.prompt_bytes:
        wanted = f"expected at most {limits.prompt_bytes}"
        raise Refused(422, "too_large", f"prompts: got one of {longest} bytes, {wanted}")
    if not fields.rewards:
        raise Refused(422, "wrong_field", "rewards: got none, expected a name at least")
    return fields


def check_counts(fields: Fields, images: int) -> None:
    """Raise Refused where images, prompts, metadata and group ids are not as many."""
    if images == 0:
        raise Refused(422, "wrong_count", "images: got none")
    for name in ("prompts", "metadata", "group"):
        values = getattr(fields, name)
        if values is not None and len(values) != images:
            wanted = f"expected {images}, one per image"
            raise Refused(422, "wrong_count", f"{name}: got {len(values)}, {wanted}")
