"""A tool: a function that a planner may ask for, described to it, checked, and held to limits."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from flowkern.agent.tools.apart import GRACE, Apart, collected, drained, reason_of
from flowkern.agent.tools.output import Output, ToolFailure
from flowkern.agent.tools.schema import Check, checked_by_schema, signature
from flowkern.checks import Range, check_fields, is_integer, shown

__all__ = ["Limits", "Result", "Tool", "ToolFailure", "tool"]

LEFT_BEHIND = 8
"""Calls of one tool that may hang at a time; no more are begun until one of them ends."""

ENDINGS = (Exception, SystemExit, asyncio.CancelledError)
"""What a tool may raise in the caller's thread and end nobody: all but the user's interrupt."""


@dataclass(frozen=True)
class Limits:
    """What one call may take. Raises ValueError naming the field that is out of range."""

    seconds: Annotated[float, Range(0, above=True, most=86_400)] = 30.0
    """From its beginning to its last character, however slowly they come."""
    characters: Annotated[int, Range(1, most=10**7)] = 10_000
    """Of output; the call is over when there are more."""

    def __post_init__(self) -> None:
        if not is_integer(self.characters):
            raise ValueError(f"characters: got {shown(self.characters)}, expected a whole number")
        check_fields(self)


@dataclass(frozen=True)
class Result:
    """What a call gave."""

    text: str
    """For the planner's memory; of a failure what there was, and the reason."""
    failure: str | None
    """The reason, on one line; None: it did not fail."""
    seconds: float


class Tool:
    """`await tool(**arguments)` -> Result. It raises nothing that the tool raises, and has ended,
    or is left behind, when its time is over.

    name, description: what a planner is told; schema: JSON schema of the arguments (a dict);
    limits: `Limits`. The function runs in a daemon thread, a coroutine in an event loop of that
    thread, so that one which blocks stops nobody else. in_caller: it runs in the caller's thread
    and event loop instead, for what is quick and is known to end, and for what holds connections
    of that loop. concurrency: so many calls at a time; the time of the others has not begun.
    """

    def __init__(
        self,
        name: str,
        description: str,
        schema: Mapping[str, Any],
        call: Callable[..., Any],
        *,
        limits: Limits | None = None,
        check: Check | None = None,
        in_caller: bool = False,
        concurrency: int | None = None,
    ) -> None:
        self.name, self.description, self.schema = name, description, dict(schema)
        self.limits = limits or Limits()
        self.in_caller, self.concurrency = in_caller, concurrency
        self._call = call
        self._check = check or checked_by_schema(self.schema)
        self._turns: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._left: list[Apart] = []

    def __repr__(self) -> str:
        return f"<tool {self.name}>"

    async def __call__(self, /, **arguments: Any) -> Result:
        begun = time.monotonic()
        output = Output(self.limits.characters)
        try:
            checked = self._check(arguments)
        except Exception as error:
            return _result(output, reason_of(error), begun)
        async with self._turn():
            begun = time.monotonic()
            run = self._in_caller if self.in_caller else self._apart
            reason = await run(lambda: self._call(**checked), output)
        return _result(output, reason, begun)

    def _turn(self) -> contextlib.AbstractAsyncContextManager:
        if self.concurrency is None:
            return contextlib.nullcontext()
        loop = asyncio.get_running_loop()  # a semaphore belongs to one; each rollout has its own
        if loop not in self._turns:
            self._turns[loop] = asyncio.Semaphore(self.concurrency)
        return self._turns[loop]

    def _too_slow(self) -> str:
        return f"it took more than {self.limits.seconds:g} s"

    async def _apart(self, call: Callable[[], Any], output: Output) -> str | None:
        self._left = [thread for thread in self._left if thread.is_alive()]
        if len(self._left) >= LEFT_BEHIND:
            return f"{len(self._left)} earlier calls of it still hang"
        thread = Apart(call, output, self.name)
        try:
            thread.start()
        except RuntimeError as error:  # no thread is to be had
            return reason_of(error)
        try:
            done, _ = await asyncio.wait({thread.done}, timeout=self.limits.seconds)
        except asyncio.CancelledError:
            self._leave(thread)
            raise
        if done:
            return thread.done.result()
        self._leave(thread)
        return self._too_slow()

    def _leave(self, thread: Apart) -> None:
        thread.abandon()
        self._left.append(thread)

    async def _in_caller(self, call: Callable[[], Any], output: Output) -> str | None:
        try:
            value = call()
            if not (inspect.isawaitable(value) or inspect.isasyncgen(value)):
                collected(value, output)
                return None
        except ENDINGS as error:
            return reason_of(error)
        task = asyncio.ensure_future(_reason(drained(value, output)))
        try:
            done, _ = await asyncio.wait({task}, timeout=self.limits.seconds)
            if done:
                return task.result()
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            with contextlib.suppress(RuntimeError):  # one that will not be closed either
                task.get_coro().close()
            task.cancel()
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return self._too_slow()


async def _reason(collecting: Any) -> str | None:
    try:
        await collecting
    except ENDINGS as error:
        return reason_of(error)
    return None


def _result(output: Output, reason: str | None, begun: float) -> Result:
    text = output.text.strip("\n")
    if reason is not None:
        text = f"{text}\n[failed: {reason}]" if text else f"failed: {reason}"
    return Result(text, reason, time.monotonic() - begun)


def tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    limits: Limits | None = None,
    in_caller: bool | None = None,
    concurrency: int | None = None,
) -> Tool:
    """The tool that a function is, or an object with a `__call__`; sync or async, with a result or
    yielding pieces of one.

    Its arguments are its parameters, which have type hints; its docstring describes it up to
    "Args:", and there each argument. name: the function's by default. An object may have `name`,
    `description`, `limits`, `in_caller` and `concurrency` of its own, which stand where none is
    given here. Raises ValueError for what cannot be a tool, and says why.
    """
    if isinstance(function, Tool):
        raise ValueError(f"tool: {function.name} is one already")
    is_plain = inspect.isfunction(function) or inspect.ismethod(function)

    def own(key: str, given: Any) -> Any:
        return given if given is not None or is_plain else getattr(function, key, None)

    called = own("name", name) or getattr(function, "__name__", type(function).__name__)
    if not callable(function):
        raise ValueError(f"tool {called}: {type(function).__name__} cannot be called")
    found = signature(function if is_plain else function.__call__, called)
    return Tool(
        called,
        own("description", None) or found.description,
        found.schema,
        function,
        limits=own("limits", limits),
        check=found.check,
        in_caller=bool(own("in_caller", in_caller)),
        concurrency=own("concurrency", concurrency),
    )
