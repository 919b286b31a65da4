"""Tools: the schema, the check, and the limits that hold whatever a tool does."""

import asyncio
import json
import re
import threading
import time
from typing import Annotated, Literal

import pytest

from flowkern.agent.tools import Limits, ToolFailure, tool
from flowkern.agent.tools.tool import LEFT_BEHIND

pytest.importorskip("pydantic", reason="pydantic is not installed: flowkern[agent]")

SHORT, LONG = (Limits(seconds=seconds, characters=50) for seconds in (0.2, 20.0))
"""For what hangs, and for what ends by itself, however busy the machine."""
TOO_SLOW = "it took more than 0.2 s"


def call(function, limits=LONG, in_caller=None, **arguments):
    made = tool(function, limits=limits, in_caller=in_caller)
    begun = time.monotonic()
    result = asyncio.run(made(**arguments))
    assert time.monotonic() - begun < 30, "what hangs does so for 60 s, or for ever"
    return result


def look_up(item: str, count: int = 2, kind: Literal["price", "weight"] = "price") -> str:
    """Finds a figure
    of an item.

    Args:
        item: Its name,
            as the table has it.
        count (int): How many.

    Returns:
        Nothing of interest.
    """
    return f"{kind} of {count} {item}"


def test_schema_is_made_of_hints_and_docstring():
    made = tool(look_up)
    assert (made.name, made.description) == ("look_up", "Finds a figure of an item.")
    assert made.schema == {
        "type": "object",
        "additionalProperties": False,
        "required": ["item"],
        "properties": {
            "item": {"type": "string", "description": "Its name, as the table has it."},
            "count": {"type": "integer", "default": 2, "description": "How many."},
            "kind": {"type": "string", "default": "price", "enum": ["price", "weight"]},
        },
    }
    json.dumps(made.schema)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "argument item is missing"),
        ({"item": "a", "to": 1}, "argument to is unknown, known are item, count, kind"),
        ({"item": "a", "count": "many"}, "argument count: expected a valid integer.*got 'many'"),
        ({"item": "a", "kind": "size"}, "argument kind: expected 'price' or 'weight', got 'size'"),
        ({"item": 3}, "argument item: expected a valid string, got 3"),
        ({"item": "a", "count": "9" * 10_000}, "argument count: "),
    ],
)
def test_arguments_are_checked_in_a_sentence(arguments, said):
    result = call(look_up, **arguments)
    assert re.search(said, result.failure) and "\n" not in result.failure
    assert len(result.failure) <= 300 and result.failure in result.text


def test_arguments_come_as_the_function_takes_them():
    assert call(look_up, item="tea", count="3").text == "price of 3 tea"

    def names(
        schema: str, self: int = 0, _x: Annotated[int, "n"] = 1, model_config: int = 2
    ) -> str:
        """Takes names that are words of pydantic or Python."""
        return f"{schema}{self}{_x}{model_config}"

    assert call(names, schema="s", self=5).text == "s512"


def no_hint(a):
    """Has a docstring."""


def no_docstring(a: int) -> str: ...


def any_arguments(*a: int) -> str:
    """Has a docstring."""


def not_json(a: threading.Thread) -> str:
    """Has a docstring."""


@pytest.mark.parametrize(
    "function, said",
    [
        (no_hint, "tool no_hint: argument a has no type hint"),
        (no_docstring, "tool no_docstring: has no docstring"),
        (
            any_arguments,
            "argument \\*a: 'int' has no name of its own|argument \\*a: int has no name",
        ),
        (not_json, "tool not_json: "),
        (3, "tool int: int cannot be called"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(function, said):
    with pytest.raises(ValueError, match=said):
        tool(function)


# What tools do wrong, and what becomes of it. Each is run in a thread of its own and, where it does
# not block, in the caller's.


def hangs() -> str:
    """Sleeps."""
    time.sleep(60)


def loops() -> str:
    """Never ends, and lets no exception end it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except Exception:
            pass


async def blocks() -> str:
    """Blocks the event loop that it runs in."""
    time.sleep(60)


async def waits() -> str:
    """Waits for ever."""
    await asyncio.Event().wait()


async def refuses_to_end() -> str:
    """Lets no cancellation end it."""
    while True:
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            pass


def drips() -> str:
    """Gives a letter now and then."""
    while True:
        yield "a"
        time.sleep(0.02)


async def drips_async() -> str:
    """Gives a letter now and then."""
    while True:
        yield "a"
        await asyncio.sleep(0.02)


def exits() -> str:
    """Ends Python, as it thinks."""
    raise SystemExit(3)


def interrupts() -> str:
    """Raises what is no Exception."""
    raise KeyboardInterrupt


def raises() -> str:
    """Raises over two lines."""
    raise RuntimeError("no\nluck" + "!" * 1000)


def cannot_say() -> str:
    """Raises an error that cannot say what it is."""

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    raise Mute


def refuses() -> str:
    """Fails with a sentence."""
    raise ToolFailure("there is no such item")


async def raises_later() -> str:
    """Raises in a coroutine."""
    await asyncio.sleep(0)
    raise ValueError("late")


async def cancels_itself() -> str:
    """Raises what its caller's cancellation would look like."""
    raise asyncio.CancelledError


def stops() -> str:
    """Raises what ends a generator."""
    raise StopIteration


async def raises_a_group() -> str:
    """Fails in one of its tasks."""
    async with asyncio.TaskGroup() as group:
        group.create_task(raises_later())


def recurses() -> str:
    """Calls itself."""
    return recurses()


def floods() -> str:
    """Gives pieces for ever."""
    while True:
        yield "flood "


async def floods_async() -> str:
    """Gives pieces for ever, without a pause."""
    while True:
        yield "flood "


def floods_at_once() -> str:
    """Gives much."""
    return "flood " * 1_000_000


def floods_by_list() -> list:
    """Gives a list that would be long."""
    return list(range(100_000))


def binary() -> bytes:
    """Gives a picture."""
    return b"\x89PNG\r\n\x1a\n\xff\xfe"


def zeros() -> bytes:
    """Gives bytes that would decode."""
    return b"abc\0def"


def half_a_character() -> bytes:
    """Stops within a character."""
    yield "né".encode()[:2]


def no_value() -> None:
    """Gives nothing."""


ANYWHERE = [
    (waits, TOO_SLOW),
    (refuses_to_end, TOO_SLOW),
    (drips_async, TOO_SLOW),
    (exits, "SystemExit: 3"),
    (raises, "RuntimeError: no luck!!"),
    (cannot_say, "Mute"),
    (refuses, "there is no such item"),
    (raises_later, "ValueError: late"),
    (cancels_itself, "CancelledError"),
    (stops, "StopIteration"),
    (raises_a_group, "ValueError: late"),
    (recurses, "RecursionError: maximum recursion depth"),
    (floods, "more than 50 characters of output"),
    (floods_async, "more than 50 characters of output"),
    (floods_at_once, "more than 50 characters of output"),
    (floods_by_list, "more than 50 characters of output"),
    (binary, "the output is binary"),
    (zeros, "the output is binary"),
    (half_a_character, "the output is binary"),
]


@pytest.mark.parametrize(
    "function, said",
    [
        (hangs, TOO_SLOW),
        (loops, TOO_SLOW),
        (blocks, TOO_SLOW),
        (drips, TOO_SLOW),
        (interrupts, "KeyboardInterrupt"),
        *ANYWHERE,
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_whatever_a_tool_does_becomes_a_failure_in_time(function, said):
    result = call(function, SHORT if said == TOO_SLOW else LONG)
    assert result.failure.startswith(said) and "\n" not in result.failure
    assert len(result.failure) <= 300 and result.failure in result.text
    assert len(result.text) < 50 + 320


@pytest.mark.parametrize(
    "function, said", ANYWHERE, ids=lambda value: getattr(value, "__name__", "")
)
def test_so_it_does_in_the_callers_thread(function, said):
    limits = SHORT if said == TOO_SLOW else LONG
    assert call(function, limits, in_caller=True).failure.startswith(said)


@pytest.mark.parametrize(
    "given, text",
    [
        ("a\r\nb\n", "a\nb"),
        ("\x1b[31mred\x1b[0m\x07 \ud800", "red "),
        ("né".encode(), "né"),
        ({"a": [1, None, "é"]}, '{"a": [1, null, "é"]}'),
        (12, "12"),
        (None, ""),
        ("x" * 50, "x" * 50),
    ],
)
def test_what_a_tool_gives_becomes_text(given, text):
    def gives() -> str:
        """Gives it."""
        return given

    for in_caller in (False, True):
        result = call(gives, in_caller=in_caller)
        assert (result.text, result.failure) == (text, None)
        result.text.encode()  # a tokenizer can take it


def test_pieces_are_joined_in_order():
    async def pieces(n: int) -> str:
        """Gives pieces, a character in two of them."""
        for piece in ("a", "né".encode()[:2], "né".encode()[2:], n):
            yield piece

    assert call(pieces, n=7).text == "ané7"


def test_a_hanging_call_holds_up_no_other():
    over = threading.Event()

    def hangs_until() -> str:
        """Hangs until the others are over."""
        return str(over.wait(30))

    async def both():
        slow = asyncio.ensure_future(tool(hangs_until, limits=Limits(seconds=60))())
        quick = tool(look_up)
        texts = [one.text for one in await asyncio.gather(*[quick(item=str(n)) for n in range(20)])]
        over.set()
        return texts, (await slow).text

    assert asyncio.run(both()) == ([f"price of 2 {n}" for n in range(20)], "True")


def test_interrupted_python_code_ends_its_thread():
    """What Python can end does not go on behind the run's back."""
    for function in (drips, waits, refuses_to_end):
        call(function, SHORT)
    end = time.monotonic() + 30

    def left():
        return [
            t
            for t in threading.enumerate()
            if t.name.split()[-1] in ("drips", "waits", "refuses_to_end")
        ]

    while left() and time.monotonic() < end:
        time.sleep(0.02)
    assert not left()


def test_so_many_may_hang_and_no_more_are_begun():
    async def many():
        made = tool(hangs, limits=Limits(seconds=0.05))
        await asyncio.gather(*[made() for _ in range(LEFT_BEHIND)])
        return await made()

    result = asyncio.run(many())
    assert result.failure == f"{LEFT_BEHIND} earlier calls of it still hang"


def test_concurrency_counts_calls_and_not_their_time():
    now, most = [], []

    def one_at_a_time() -> str:
        """Notes how many run."""
        now.append(1)
        most.append(len(now))
        time.sleep(0.05)
        now.pop()
        return "done"

    made = tool(one_at_a_time, limits=Limits(seconds=0.9), concurrency=2)

    async def many(calls):
        return await asyncio.gather(*[made() for _ in range(calls)])

    for calls in (40, 4):  # the last waits for 1 s; each rollout has an event loop of its own
        assert {one.failure for one in asyncio.run(many(calls))} == {None}
    assert max(most) == 2


def test_a_cancelled_caller_is_cancelled():
    async def cancelled():
        task = asyncio.ensure_future(tool(drips, limits=Limits(seconds=5))())
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
