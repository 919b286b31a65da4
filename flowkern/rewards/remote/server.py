"""A server of rewards: the HTTP around a `Service`, with starlette and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flowkern.rewards.http import seconds_for
from flowkern.rewards.remote.body import READERS
from flowkern.rewards.remote.protocol import JSON, PROTOCOL, Refused
from flowkern.rewards.remote.service import Service

DRAIN_S = 60
"""Seconds in which requests are still answered after the server was told to end."""
DISCARD_S = 30
"""Seconds in which a body that is refused may come to its end."""
CONNECTIONS = 256
LONGEST_KEY = 128


def app(service: Service, token: str | None = None, upload_s: float | None = None) -> Starlette:
    """token: what a client has to send, but for /healthz; None: nothing. upload_s: seconds that a
    body may take to come; None: by its size."""

    async def score(request: Request) -> Response:
        try:
            kind, key = _head(request, token)
            service.require_room(key)
        except Refused:
            await _discard(request, service.limits.max_bytes)
            raise
        body, digest = await _body(request, kind, service.limits.max_bytes, upload_s)
        answer = service.submit(kind, body, key, digest)
        # Of one that gives up meanwhile, another may ask for the same.
        return Response(await asyncio.shield(asyncio.wrap_future(answer)), media_type=JSON)

    async def info(request: Request) -> Response:
        _authorize(request, token)
        return JSONResponse(service.about())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    return Starlette(
        routes=[
            Route("/v1/score", score, methods=["POST"]),
            Route("/v1/info", info),
            Route("/healthz", health),
        ],
        exception_handlers={Refused: _refusal, HTTPException: _other, Exception: _fault},
        lifespan=lifespan,
    )


def _head(request: Request, token: str | None) -> tuple[str, str | None]:
    """(content type, idempotency key) of a request whose body may be read."""
    _authorize(request, token)
    known = request.headers.get("flowkern-protocol", str(PROTOCOL))
    if known != str(PROTOCOL):
        got = f"Flowkern-Protocol: got {known:.20}, expected {PROTOCOL}"
        raise Refused(400, "unknown_protocol", got)
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= LONGEST_KEY:
        got = f"Idempotency-Key: got {len(key)} characters, expected 1 to {LONGEST_KEY}"
        raise Refused(400, "bad_key", got)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in READERS:
        got = f"Content-Type: got {kind!r:.100}, expected {' or '.join(READERS)}"
        raise Refused(415, "unknown_type", got)
    return kind, key


async def _discard(request: Request, most: int) -> None:
    """Let a body come that nobody reads: who sends it would else see a broken connection, and not
    the answer."""
    with contextlib.suppress(Refused):
        async for _ in _parts(request, 4 * most, DISCARD_S):
            pass


def _authorize(request: Request, token: str | None) -> None:
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not is_right:
        raise Refused(401, "unauthorized", "Authorization: expected Bearer and the server's token")


async def _body(
    request: Request, kind: str, most: int, upload_s: float | None
) -> tuple[bytes, bytes]:
    """The body, and the digest of it and its type."""
    said = request.headers.get("content-length", "")
    announced = int(said) if said.isdecimal() else most
    if announced > most:
        await _discard(request, most)
        raise _too_large(most)
    parts, digest = [], hashlib.sha256(kind.encode())
    async for part in _parts(request, most, upload_s or seconds_for(announced)):
        parts.append(part)
        digest.update(part)
    return b"".join(parts), digest.digest()


def _too_large(most: int) -> Refused:
    return Refused(413, "too_large", f"body: expected at most {most} bytes")


async def _parts(request: Request, most: int, seconds: float) -> AsyncIterator[bytes]:
    """Of a body, not past the limit, and not after its time."""
    size, end = 0, asyncio.get_running_loop().time() + seconds
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout_at(end):
                part = await anext(stream, None)
        except TimeoutError:
            raise Refused(408, "slow", f"body: not here after {seconds:.3g} s") from None
        except ClientDisconnect:
            raise Refused(400, "broken", "body: ended early") from None
        if part is None:
            return
        size += len(part)
        if size > most:
            raise _too_large(most)
        yield part


def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _error(error.status, error.code, str(error), headers)


def _other(_: Request, error: Exception) -> Response:
    """No such address, or no such method there."""
    assert isinstance(error, HTTPException)
    return _error(error.status_code, "no_such_thing", error.detail, dict(error.headers or {}))


def _fault(_: Request, error: Exception) -> Response:
    """Of this server; what it was is in its log alone."""
    return _error(500, "fault", f"{type(error).__name__}; the server's log has more", {})


def _error(status: int, code: str, message: str, headers: dict[str, str]) -> Response:
    tree = {"error": {"code": code, "message": " ".join(message.split())[:500]}}
    return Response(json.dumps(tree), status, {**headers, "content-type": JSON})


def is_this_machine(host: str) -> bool:
    """Does an address take connections from this machine alone?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError where that cannot be listened at. Port 0: any that is free."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)


class _Server(uvicorn.Server):
    """At a first signal, what was asked for has its time; at a second one, or after it, it is told
    that it gets no answer."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # In a thread: what a signal interrupts may hold what this needs.
        late = threading.Timer(0 if self.should_exit else DRAIN_S, self.service.refuse)
        late.daemon = True
        late.start()
        if not self.should_exit:
            super().handle_exit(sig, frame)


def serve(
    service: Service,
    listening: socket.socket,
    token: str | None = None,
    is_ready: Callable[[], Any] = lambda: None,
) -> None:
    """Until SIGINT or SIGTERM: what was asked for by then is answered first, a second one drops it.

    Ends with the signal, as if nothing had taken it: KeyboardInterrupt for SIGINT.
    """
    config = uvicorn.Config(
        app(service, token),
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
    )
    is_ready()
    try:
        _Server(config, service).run(sockets=[listening])
    finally:
        service.close()
