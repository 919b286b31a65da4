"""The answers of a server of rewards, apart from how they travel."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from flowkern import __version__
from flowkern.rewards import Reward
from flowkern.rewards.remote.body import decode
from flowkern.rewards.remote.protocol import PROTOCOL, Limits, Refused
from flowkern.rewards.remote.worker import Parts, Worker

REMEMBERED_S, REMEMBERED = 600.0, 1024
"""How long, and how many answers are kept for a client that asks again."""


@dataclass(frozen=True)
class Served:
    """A reward, and what it was made of."""

    reward: Reward
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Another one scores otherwise, maybe."""
        engine = str(getattr(self.reward, "version", ""))  # of what it runs, where it says so
        made = json.dumps([self.kind, dict(self.options), engine], sort_keys=True, default=str)
        return f"{__version__}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class _Known:
    digest: bytes
    answer: Future[bytes]
    until: float


class Service:
    """Rewards by name, each in a thread; requests in bytes, answers in bytes.

    batch: images of a call of a reward; requests: how many are worked on or wait, beyond which
    another is refused for a while. clock: in seconds.
    """

    def __init__(
        self,
        rewards: Mapping[str, Served],
        limits: Limits | None = None,
        *,
        batch: int = 32,
        requests: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rewards, self.limits = rewards, limits or Limits()
        self.batch, self.requests = batch, requests
        self._workers = {n: Worker(n, one.reward, batch) for n, one in rewards.items()}
        self._pool = ThreadPoolExecutor(requests, "request")
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._running, self._is_closed = 0, False
        self._lock = threading.Lock()
        self._clock = clock

    def require_room(self, key: str | None = None) -> None:
        """Raise Refused where a request had better come later, but for one that was here before."""
        with self._lock:
            self._require_room(key)

    def _require_room(self, key: str | None) -> None:
        if self._is_closed:
            raise Refused(503, "closing", "the server is shutting down")
        if self._running >= self.requests and key not in self._known:
            raise Refused(429, "busy", f"{self._running} requests wait already")

    def submit(
        self, content_type: str, body: bytes, key: str | None, digest: bytes
    ) -> Future[bytes]:
        """The answer to come; that of a key that was here before is the one that it had, and
        nothing is scored twice.

        digest: of type and body. Raises Refused for a key that came with another one, and where
        there is no room; so may the answer.
        """
        with self._lock:
            now = self._clock()
            while self._known and (
                len(self._known) >= REMEMBERED or next(iter(self._known.values())).until < now
            ):
                self._known.popitem(last=False)
            known = self._known.get(key) if key else None
            if known is not None:
                if known.digest != digest:
                    raise Refused(409, "key_reused", "Idempotency-Key: came with another body")
                return known.answer
            self._require_room(key)
            self._running += 1
            answer = self._pool.submit(self._answer, content_type, body)
            if key:
                self._known[key] = _Known(digest, answer, now + REMEMBERED_S)
        answer.add_done_callback(lambda done: self._ended(key, done))
        return answer

    def _ended(self, key: str | None, answer: Future[bytes]) -> None:
        with self._lock:
            self._running -= 1
            is_bad = answer.cancelled() or answer.exception() is not None
            if is_bad and key in self._known and self._known[key].answer is answer:
                del self._known[key]  # asked again, it may go well

    def _answer(self, content_type: str, body: bytes) -> bytes:
        begin = time.perf_counter()
        request = decode(content_type, body, self.limits)
        fields, names = request.fields, list(dict.fromkeys(request.fields.rewards))
        for name in names:
            if name not in self._workers:
                known = ", ".join(self._workers)
                raise Refused(404, "unknown_reward", f"{name!r:.100}: expected one of {known}")
        jobs = {
            name: self._workers[name].score(
                request.images, fields.prompts, request.metadata, fields.group
            )
            for name in names
        }
        # All of them are at work before the first is waited for.
        tables = {name: _table(name, parts, len(request.images)) for name, parts in jobs.items()}
        tree = {
            "protocol": PROTOCOL,
            "request_id": fields.request_id,
            "rewards": {name: table.scores for name, table in tables.items()},
            "info": {name: table.info for name, table in tables.items()},
            "errors": [error for table in tables.values() for error in table.errors],
            "versions": {name: self.rewards[name].version for name in names},
            "seconds": round(time.perf_counter() - begin, 6),
        }
        return json.dumps(tree, allow_nan=False).encode()

    def about(self) -> dict[str, Any]:
        """What a client looks at before it begins."""
        return {
            "protocol": [PROTOCOL],
            "ready": not self._is_closed,
            "rewards": {
                name: {
                    "kind": self.rewards[name].kind,
                    "version": self.rewards[name].version,
                    "takes_group": worker.takes_group,
                    "scales": {k: list(v) for k, v in scales(worker.reward).items()},
                    "default_scale": getattr(worker.reward, "default_scale", None),
                    "waiting": worker.waiting,
                }
                for name, worker in self._workers.items()
            },
            "limits": asdict(self.limits) | {"batch": self.batch, "requests": self.requests},
            "running": self._running,
            "packages": {"flowkern": __version__, "torch": torch.__version__},
        }

    def refuse(self) -> None:
        """What comes, and what is not answered yet."""
        self._is_closed = True
        for worker in self._workers.values():
            worker.close()

    def close(self) -> None:
        self.refuse()
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Table(NamedTuple):
    """What an answer has of one reward, in the order of the images; JSON has no NaN."""

    scores: list[float | None]
    info: dict[str, list[float | None]]
    errors: list[dict[str, Any]]


def _table(name: str, parts: Parts, count: int) -> _Table:
    """Raises what a part ended with."""
    table = _Table([None] * count, {}, [])
    for places, done in parts:
        found = done.result()
        for i, score in zip(places, found.scores, strict=True):
            if math.isfinite(score):
                table.scores[i] = score
                continue
            code, said = "not_finite", f"the reward gave {score}"
            if found.reason is not None:
                code, said = "unscored", found.reason
            table.errors.append({"index": i, "reward": name, "code": code, "message": said})
        for entry, values in found.info.items():
            row = table.info.setdefault(entry, [None] * count)
            for i, value in zip(places, values, strict=True):
                row[i] = value if math.isfinite(value) else None
    return table


def scales(reward: Reward) -> Mapping[str, tuple[float, float]]:
    """name -> (factor, offset): scalings of its scores that others use, if it says some."""
    return getattr(reward, "scales", None) or {}
