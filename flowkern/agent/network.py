"""HTTP as all of an agent speaks it: how long a call may take, what is tried again, how much is
read, and one line of why it failed.

Nothing here keeps a connection: a rollout is an event loop of its own, and what is left open in one
that has ended cannot be closed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

import httpx2

from flowkern.checks import ABOVE_0, AT_LEAST_0, Range, check_fields, count
from flowkern.web import bearer, checked_url, line, retry_after, token

__all__ = [
    "Caller",
    "FailedCall",
    "Patience",
    "ask",
    "bearer",
    "checked_url",
    "line",
    "parsed",
    "refusal",
    "retry_after",
    "token",
    "transport",
    "web_client",
    "why",
]

T = TypeVar("T")

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Status codes of what may go well another time."""


class FailedCall(RuntimeError):
    """A call that gave no answer; its text is the reason, on one line.

    again: it may go well another time; wait_s: after so many seconds, as the server said.
    """

    def __init__(self, reason: str, again: bool = False, wait_s: float | None = None) -> None:
        super().__init__(line(reason))
        self.again, self.wait_s = again, wait_s


@dataclass(frozen=True)
class Patience:
    """How long to wait for another machine, how often to ask it, and how much to read."""

    timeout_s: Annotated[float, ABOVE_0] = 120.0
    """Of one attempt, to its last byte: an answer that comes by drops is late too."""
    deadline_s: Annotated[float, ABOVE_0] = 600.0
    """Of a call: its attempts and the waits between them, not its place in the queue."""
    retries: Annotated[int, Range(0, most=100)] = 4
    """Attempts after the first, of what may go well another time: 429, 500, a dropped line."""
    backoff_s: Annotated[float, AT_LEAST_0] = 0.5
    """Before the first of them; twice as long before each further one, unless the server says."""
    concurrency: Annotated[int, count(10_000)] = 64
    """Calls at a time; the others queue."""
    max_bytes: Annotated[int, count(2**31)] = 4 * 2**20
    """Of an answer's body; what is longer is not read to its end."""

    def __post_init__(self) -> None:
        check_fields(self)


class Caller:
    """Calls with patience: at most so many at a time, each tried again within its deadline.

    secret: a token, which no reason is to hold: servers say it back, and reasons are shown to
    models.
    """

    def __init__(self, patience: Patience, secret: str | None = None) -> None:
        self.patience, self._secret = patience, secret
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def __call__(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` gives, which raises FailedCall; so does this, with the last reason."""
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate[0] is not loop:
            self._gate = loop, asyncio.Semaphore(self.patience.concurrency)
        async with self._gate[1]:
            try:
                return await self._persist(attempt, loop.time() + self.patience.deadline_s)
            except FailedCall as error:
                if self._secret is None or self._secret not in str(error):
                    raise
                raise FailedCall(str(error).replace(self._secret, "(the token)")) from None

    async def _persist(self, attempt: Callable[[], Awaitable[T]], end: float) -> T:
        now = asyncio.get_running_loop().time
        for tried in range(1, self.patience.retries + 2):
            seconds = min(self.patience.timeout_s, end - now())
            try:
                async with asyncio.timeout(seconds):
                    return await attempt()
            except FailedCall as error:
                failure = error
            except TimeoutError:
                failure = FailedCall(f"no answer within {seconds:.3g} s", again=True)
            wait_s = failure.wait_s
            if wait_s is None:
                wait_s = min(30.0, self.patience.backoff_s * 2 ** (tried - 1))
            if not failure.again:
                raise failure
            if tried > self.patience.retries or now() + wait_s >= end:
                times = f"; tried {tried} times" if tried > 1 else ""
                raise FailedCall(f"{failure}{times}") from failure
            await asyncio.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


@cache
def _trust() -> Any:
    """The certificates to trust, read once: it takes longer than a call."""
    return httpx2.create_ssl_context()


def web_client(max_bytes: int, **options: Any) -> httpx2.AsyncClient:
    """A client without a time limit of its own (a `Caller` has one) that keeps no connection, and
    raises FailedCall for an answer that is longer than `max_bytes`, or packed: so what is read is
    what is held.
    """

    async def limit(response: httpx2.Response) -> None:
        coding = response.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise FailedCall(f"the answer is packed ({coding}), which was not asked for")
        response.stream = _Limited(response.stream, max_bytes)

    if "transport" not in options:
        options["verify"] = _trust()
    return httpx2.AsyncClient(
        timeout=None,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        headers={"accept-encoding": "identity", **options.pop("headers", {})},
        event_hooks={"response": [limit]},
        **options,
    )


def transport() -> httpx2.AsyncHTTPTransport:
    """What a client sends requests with, where something has to stand before it."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.AsyncHTTPTransport(verify=_trust(), limits=limits)


class _Limited(httpx2.AsyncByteStream):
    """A body that raises FailedCall where it goes on after `max_bytes`."""

    def __init__(self, stream: Any, max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = 0
        async for part in self._stream:
            read += len(part)
            if read > self._max_bytes:
                raise FailedCall(f"the answer is longer than {self._max_bytes} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


def why(error: BaseException) -> FailedCall:
    """The reason of an error of httpx2 (or of what is built on it), and whether to try again."""
    if isinstance(error, FailedCall):
        return error
    if isinstance(error, httpx2.TimeoutException):
        return FailedCall("no answer in time", again=True)
    if isinstance(error, httpx2.ConnectError):
        return FailedCall(f"cannot connect: {error}", again=True)
    if isinstance(error, httpx2.TransportError):
        return FailedCall(f"the connection broke: {error or type(error).__name__}", again=True)
    return FailedCall(f"{type(error).__name__}: {error}")


def refusal(status: int, headers: Mapping[str, str], body: str = "") -> FailedCall:
    """The reason of an answer whose status is no success."""
    said = f": {line(body, 160)}" if body.strip() else ""
    again = status in AGAIN
    return FailedCall(f"answered {status}{said}", again, retry_after(headers) if again else None)


async def ask(client: httpx2.AsyncClient, method: str, url: str, **request: Any) -> bytes:
    """The body of the answer to one request; raises FailedCall with the reason."""
    try:
        response = await client.request(method, url, **request)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise why(error) from error
    if response.is_success:
        return response.content
    raise refusal(response.status_code, response.headers, response.text)


def parsed(body: bytes | str) -> Any:
    """JSON, or FailedCall: an answer that is none is not worth another attempt."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FailedCall(f"the answer is not JSON: {type(error).__name__}") from error
