"""A call in a thread of its own, which is left behind where it does not end in time."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import threading
from collections.abc import Callable
from typing import Any

from flowkern.agent.tools.output import Output, ToolFailure, one_line

__all__ = ["Apart", "collected", "drained", "reason_of"]

GRACE = 0.5
"""Seconds from a cancelled coroutine to the end of its thread."""


class _Abandoned(BaseException):
    """Raised within a thread that nobody waits for any more."""


def reason_of(error: BaseException) -> str:
    """Why a call failed: a sentence of the tool's own, or what it raised, on one line."""
    while isinstance(error, BaseExceptionGroup):  # of tasks; one of its reasons says more
        error = error.exceptions[0]
    if isinstance(error, ToolFailure):
        return one_line(error)
    try:
        said = str(error)
    except Exception:  # an exception that cannot say what it is
        said = ""
    return one_line(f"{type(error).__name__}: {said}" if said else type(error).__name__)


def collected(value: Any, output: Output) -> None:
    """Put what a function returned, or yields, into `output`."""
    if inspect.isgenerator(value):
        for piece in value:
            output.add(piece)
    else:
        output.add(value)
    output.end()


async def drained(value: Any, output: Output) -> None:
    """As `collected`, of an awaitable or what yields asynchronously."""
    if inspect.isasyncgen(value):
        async for piece in value:
            output.add(piece)
        output.end()
    else:
        collected(await value, output)


class Apart(threading.Thread):
    """Runs `call`, and a coroutine that it gives in an event loop of its own, into `output`.

    `done` is a future of the loop that made it: None, or the reason of a failure. The thread is a
    daemon, so that one that never ends keeps neither `asyncio.run` nor the process.
    """

    def __init__(self, call: Callable[[], Any], output: Output, name: str) -> None:
        super().__init__(name=f"tool {name}", daemon=True)
        self.call, self.output = call, output
        self.home = asyncio.get_running_loop()
        self.done: asyncio.Future[str | None] = self.home.create_future()
        self._own: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None
        self._lock, self._over = threading.Lock(), False

    def run(self) -> None:
        try:
            try:
                self._run()
                reason = None
            except _Abandoned:
                raise
            except BaseException as error:  # SystemExit and KeyboardInterrupt of a tool end nobody
                reason = reason_of(error)
            with self._lock:
                self._over = True
            self.home.call_soon_threadsafe(self._tell, reason)
        except (_Abandoned, RuntimeError):  # nobody waits: left behind, or the home loop is closed
            pass

    def _tell(self, reason: str | None) -> None:
        if not self.done.done():
            self.done.set_result(reason)

    def _run(self) -> None:
        value = self.call()
        if not (inspect.isawaitable(value) or inspect.isasyncgen(value)):
            collected(value, self.output)
            return
        loop = asyncio.new_event_loop()
        # asyncio.run would wait for a task that does not let itself be cancelled.
        loop.set_exception_handler(lambda *_: None)
        try:
            self._task = loop.create_task(drained(value, self.output))
            self._own = loop
            loop.run_until_complete(self._task)
        finally:
            self._own = None
            loop.close()

    def abandon(self) -> None:
        """End it as far as Python can: a coroutine is cancelled, Python code interrupted; what
        hangs within C stays, in a thread that nobody waits for."""
        loop = self._own
        if loop is None:
            return self._interrupt()
        try:
            loop.call_soon_threadsafe(self._cancel, loop)
        except RuntimeError:  # it has just ended
            return
        timer = threading.Timer(GRACE, self._interrupt)
        timer.daemon = True
        timer.start()

    def _cancel(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task.cancel()
        loop.call_later(GRACE / 2, loop.stop)

    def _interrupt(self) -> None:
        with self._lock:
            if not self._over and self.is_alive():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self.ident), ctypes.py_object(_Abandoned)
                )
