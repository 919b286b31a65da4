"""HTTP as all rewards speak it: what is tried again, how long a call may take, how much is read.

    server = Http("http://judge:8000", secret=token, timeout=60)
    answer = server.post("/v1/score", json={...}).json()

A call ends with a `Response`, with RewardError where asking again cannot help (a wrong token, a
body that the server refuses), or with Unscored where the server had its chances; and it ends in its
time. Any thread may call, many at a time, also one in which an event loop runs.
"""

from __future__ import annotations

import asyncio
import json as jsons
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

from flowkern.checks import ConfigError
from flowkern.rewards import RewardError, Unscored
from flowkern.web import bearer, checked_url, line, retry_after

__all__ = ["Http", "Response"]

AGAIN = frozenset({408, 425, 429})
"""Status codes below 500 of what may go well another time; all from 500 on may."""
CONNECT_S = 5.0
LONGEST_WAIT_S = 10.0
REFUSAL = 4096
"""Bytes of an answer that are read to say why it is none."""
MIB = 2**20


@dataclass(frozen=True)
class Response:
    """An answer whose status is a success."""

    url: str
    status: int
    headers: Mapping[str, str]
    """By names in lower case."""
    content: bytes

    def json(self) -> Any:
        """Raises Unscored for what is no JSON: a page of something between here and the server."""
        try:
            return jsons.loads(self.content)
        except (ValueError, RecursionError) as error:
            text = line(self.content[:800].decode("utf-8", "replace"), 120)
            raise Unscored(f"{self.url}: the answer is not JSON: {text!r}") from error


@dataclass(frozen=True)
class Http:
    """A server, and the patience with it. No proxy of the environment stands between.

    url: http://HOST:PORT or https://HOST, a path may follow; raises ConfigError for what is none.
    timeout: seconds of a call, all its attempts and the waits between them; None: 60, and 3 for
    each MiB that is sent. retries: attempts after the first. max_bytes: of an answer; a longer one
    is not read to its end. secret: sent as a bearer token, and in no message.

    transport, clock, sleep: what tests put in the place of the network, time and waiting.
    """

    url: str
    secret: str | None = field(default=None, repr=False)
    timeout: float | None = None
    retries: int = 4
    max_bytes: int = 4 * MIB
    transport: Any = field(default=None, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", checked_url(self.url, "url"))
        library()

    def post(self, path: str, **call: Any) -> Response:
        """POST to url + path, as `request`; with content or json."""
        return self.request("POST", path, **call)

    def get(self, path: str, **call: Any) -> Response:
        return self.request("GET", path, **call)

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Response:
        """The answer. Every attempt of a POST has the same `idempotency-key`: one of its own,
        unless headers has one.

        timeout, retries: of this call; None: of this server.
        Raises RewardError for a status of 300 to 499 that does not pass by itself, and Unscored for
        what is still not there after the last attempt, or is too long; both name url + path.
        """
        sent = {"accept-encoding": "identity"} | bearer(self.secret)
        if json is not None:
            content = jsons.dumps(json, allow_nan=False).encode()
            sent["content-type"] = "application/json"
        if method == "POST":
            sent["idempotency-key"] = uuid.uuid4().hex
        sent |= {name.lower(): value for name, value in (headers or {}).items()}
        if timeout is None:
            timeout = self.timeout
        if timeout is None:
            timeout = seconds_for(len(content or b""))
        retries = self.retries if retries is None else retries
        call = _Call(self, method, f"{self.url}{path}", content, sent)
        try:
            return _run(call.persist(timeout, retries))
        except RewardError as error:
            if self.secret is None or self.secret not in str(error):
                raise
            raise type(error)(str(error).replace(self.secret, "(the token)")) from None


def seconds_for(size: int) -> float:
    """That a call may take which sends so many bytes, where nobody says another number."""
    return 60.0 + 3.0 * size / MIB


class _Again(Exception):
    """An attempt failed, for a reason that may pass; wait_s: when the server says it does."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(line(reason))
        self.wait_s = wait_s


@dataclass(frozen=True)
class _Call:
    server: Http
    method: str
    url: str
    content: bytes | None
    headers: Mapping[str, str]

    async def persist(self, timeout: float, retries: int) -> Response:
        """Attempts until one is answered; nothing is kept open afterwards."""
        web, server = library(), self.server
        end = server.clock() + timeout
        # Ours alone: what a training draws does not depend on how often a server was asked.
        jitter = random.Random()
        async with web.AsyncClient(
            trust_env=False,
            timeout=web.Timeout(None, connect=CONNECT_S),
            transport=server.transport,
            **({} if server.transport else {"verify": _trust()}),
        ) as client:
            for tried in range(1, retries + 2):
                try:
                    async with asyncio.timeout(end - server.clock()):
                        return await self._attempt(web, client)
                except TimeoutError:
                    raise Unscored(f"{self.url}: no answer within {timeout:.3g} s") from None
                except _Again as error:
                    wait_s = error.wait_s
                    if wait_s is None:
                        doubled = 0.5 * 2 ** min(tried - 1, 10)  # of thousands: beyond a float
                        wait_s = jitter.uniform(0, min(LONGEST_WAIT_S, doubled))
                    if tried > retries or server.clock() + wait_s >= end:
                        times = f"; tried {tried} times" if tried > 1 else ""
                        raise Unscored(f"{self.url}: {error}{times}") from None
                await server.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, web: ModuleType, client: Any) -> Response:
        """Raises _Again, or what the call ends with."""
        try:
            async with client.stream(
                self.method, self.url, content=self.content, headers=self.headers
            ) as answer:
                body = await self._read(answer)
        except web.ConnectError as error:
            raise _Again(f"cannot connect: {str(error) or type(error).__name__}") from error
        except web.ConnectTimeout as error:
            raise _Again(f"cannot connect: no answer within {CONNECT_S:g} s") from error
        except web.TransportError as error:
            raise _Again(f"the connection broke: {str(error) or type(error).__name__}") from error
        except web.InvalidURL as error:
            raise RewardError(f"{self.url}: {error}") from error
        if answer.is_success:
            return Response(self.url, answer.status_code, dict(answer.headers), body)
        said = line(_message(body[:REFUSAL].decode("utf-8", "replace")), 200)
        reason = f"answered {answer.status_code}{': ' if said else ''}{said}"
        if answer.status_code in AGAIN or answer.status_code >= 500:
            raise _Again(reason, retry_after(answer.headers))
        raise RewardError(f"{self.url}: {reason}")

    async def _read(self, answer: Any) -> bytes:
        """As much as is allowed; of a refusal, as much as is shown."""
        coding = answer.headers.get("content-encoding", "identity")
        if coding != "identity":  # a small body may unpack to a large one
            raise Unscored(f"{self.url}: the answer is packed ({coding}), which was not asked for")
        most = self.server.max_bytes
        body = bytearray()
        async for part in answer.aiter_bytes():
            body += part
            if not answer.is_success and len(body) >= REFUSAL:
                break
            if len(body) > most:
                raise Unscored(f"{self.url}: the answer is longer than {most} bytes")
        return bytes(body)


def _message(text: str) -> str:
    """Of {"error": {"message": ...}}, as many servers have it; else all of it."""
    try:
        said = jsons.loads(text)["error"]["message"]
    except (ValueError, RecursionError, TypeError, LookupError):
        return text
    return said if isinstance(said, str) else text


@cache
def library() -> ModuleType:
    """httpx2, or httpx, which has the same names; raises ConfigError where there is neither."""
    try:
        import httpx2 as found
    except ImportError:
        try:
            import httpx as found
        except ImportError:
            raise ConfigError(
                "a reward over HTTP needs httpx2: pip install 'flowkern[train]'"
            ) from None
    return found


@cache
def _trust() -> Any:
    """The certificates to trust, read once: it takes longer than a call."""
    return library().create_ssl_context()


def _run(call: Coroutine[Any, Any, Response]) -> Response:
    """In an event loop of its own, also where one runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(call)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, call).result()
