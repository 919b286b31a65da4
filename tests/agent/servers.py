"""A local stand-in for the servers that an agent calls: plain HTTP/1.1 on asyncio in a thread, with
faults to order.

`Server(routes)` serves while it is entered; a route is `(request) -> answer`, where an answer is
JSON or an `Answer`. What `server.faults` holds is given instead, one for each request in turn
(None: as usual).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """An answer as no server should give it. answer: what it begins with, None: the usual one."""

    answer: Answer | None = None
    drop_after: int | None = None
    """Bytes of the body after which the connection is cut."""
    drip_s: float | None = None
    """Seconds between one byte and the next."""


DROPPED = Fault(drop_after=7)
HUNG_UP = Fault(Answer(), drop_after=-1)
"""Cut before the status."""
BY_DROPS = Fault(drip_s=0.01)
BUSY = Fault(Answer(b"too many", 429, {"retry-after": "0"}))
BROKEN = Fault(Answer(b"Internal Server Error", 500, {"retry-after": "0"}))
FLOOD = Fault(Answer(b"x" * 10 * 2**20))
NOT_JSON = Fault(Answer(b"<html>hello</html>"))


class Server:
    def __init__(self, routes: Mapping[str, Callable[[Request], Any]]) -> None:
        self.routes = routes
        self.faults: deque[Fault | None] = deque()
        self.requests: list[Request] = []
        self.busy = self.most_busy = 0
        self.gate: threading.Barrier | None = None

    def __enter__(self) -> Server:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connection, "127.0.0.1", 0), self._loop
        )
        self._server = started.result()
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            request = await self._request(reader)
            self.requests.append(request)
            fault = self.faults.popleft() if self.faults else None
            answer = fault.answer if fault else None
            await self._send(writer, answer or self._answer(request), fault or Fault())
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            self.busy -= 1
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ")
        pairs = (text.partition(":") for text in head[1:] if text)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(method, target, headers, body)

    def _answer(self, request: Request) -> Answer:
        route = self.routes.get(request.path)
        if route is None:
            return Answer(b"no such page", 404)
        found = route(request)
        if isinstance(found, Answer):
            return found
        return Answer(json.dumps(found).encode(), headers={"content-type": "application/json"})

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer, fault: Fault) -> None:
        if fault.drop_after == -1:
            return
        headers = {"content-length": str(len(answer.body)), "connection": "close", **answer.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {answer.status} SAID\r\n{head}\r\n".encode())
        body = answer.body[: fault.drop_after]
        if fault.drip_s is None:
            writer.write(body)
        for i in range(len(body) if fault.drip_s is not None else 0):
            writer.write(body[i : i + 1])
            await writer.drain()
            await asyncio.sleep(fault.drip_s)
        await writer.drain()
