"""Tools that were written for others: smolagents' `Tool`, and those of an MCP server."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.util import find_spec
from typing import Any

from flowkern.agent.tools.apart import reason_of
from flowkern.agent.tools.output import ToolFailure
from flowkern.agent.tools.tool import Tool
from flowkern.checks import ConfigError, shown
from flowkern.extras import wanting
from flowkern.lookup import load

__all__ = ["McpTool", "SmolagentsTool"]


class SmolagentsTool(Tool):
    """tool: a `smolagents.Tool`, a class of one, or "module:attribute" of either: what has name,
    description, inputs, output_type and forward. Raises ConfigError for what has not."""

    def __init__(self, tool: Any) -> None:
        found = load(tool, {}, "tool") if isinstance(tool, str) else tool
        found = found() if inspect.isclass(found) else found
        for field in ("name", "description", "inputs"):
            if not hasattr(found, field) or not callable(getattr(found, "forward", None)):
                raise ConfigError(
                    f"tool: got {shown(tool)}, expected smolagents' Tool: name, description, "
                    "inputs and forward"
                )
        inputs: Mapping[str, Mapping[str, Any]] = found.inputs
        schema = {
            "type": "object",
            "properties": {key: _property(one) for key, one in inputs.items()},
            "required": [key for key, one in inputs.items() if not one.get("nullable")],
            "additionalProperties": False,
        }
        # Its own call sets it up the first time.
        call = found if callable(found) else found.forward
        super().__init__(found.name, " ".join(found.description.split()), schema, call)


JSON_TYPES = {"string", "integer", "number", "boolean", "array", "object", "null"}


def _property(of: Mapping[str, Any]) -> dict[str, Any]:
    """smolagents also knows "any", and pictures and sounds, which JSON does not."""
    given = of.get("type")
    types = [one for one in ([given] if isinstance(given, str) else given) if one in JSON_TYPES]
    if of.get("nullable") and types:
        types.append("null")
    found = {"description": of["description"]} if of.get("description") else {}
    return {**({"type": types[0] if len(types) == 1 else types} if types else {}), **found}


Connect = Callable[[], AbstractAsyncContextManager[Any]]


class McpTool(Tool):
    """A tool of an MCP server. server: its URL, or the command that starts it, as a list; tool: its
    name there. Every call has a connection of its own, in the time of the call.

    connect: instead of mcp's own client, what gives a client with list_tools and call_tool. Raises
    ConfigError where mcp is not installed, the server does not answer within 30 s, or has no such
    tool.
    """

    def __init__(
        self, server: str | Sequence[str], tool: str, connect: Connect | None = None
    ) -> None:
        self._connect = connect or _client(server)
        try:
            listed = _elsewhere(self._listed())
        except Exception as error:
            raise ConfigError(f"server: {shown(server)}: {reason_of(error)}") from error
        found = {one.name: one for one in listed}.get(tool)
        if found is None:
            there = ", ".join(sorted(one.name for one in listed)) or "none"
            raise ConfigError(f"tool: got {shown(tool)}, {shown(server)} has {there}")
        self._tool = tool
        super().__init__(tool, found.description or tool, found.input_schema, self._ask)

    async def _listed(self) -> list[Any]:
        async with self._connect() as client:
            found, cursor = [], None
            for _ in range(100):
                page = await client.list_tools(cursor=cursor)
                found += page.tools
                cursor = page.next_cursor
                if not cursor:
                    break
            return found

    async def _ask(self, **arguments: Any) -> str:
        async with self._connect() as client:
            result = await client.call_tool(self._tool, arguments)
        texts = [block.text for block in result.content if getattr(block, "type", "") == "text"]
        if result.is_error:
            raise ToolFailure("\n".join(texts) or "the server says that it failed")
        if not texts and result.content:
            kinds = ", ".join(sorted({block.type for block in result.content}))
            raise ToolFailure(f"the output is no text but {kinds}")
        return "\n".join(texts)


def _client(server: str | Sequence[str]) -> Connect:
    if find_spec("mcp") is None:
        raise wanting("an MCP server", "mcp")
    import mcp

    if isinstance(server, str):
        return lambda: mcp.Client(server)
    command, *arguments = server
    return lambda: mcp.Client(mcp.StdioServerParameters(command=command, args=arguments))


def _elsewhere(coroutine: Any) -> Any:
    """Its result, also where an event loop runs already. Raises what it raises."""
    got: list[Any] = []

    def run() -> None:
        try:
            got.append((asyncio.run(asyncio.wait_for(coroutine, 30)), None))
        except BaseException as error:
            got.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(35)
    if not got:
        raise ToolFailure("it did not answer within 30 s")
    value, error = got[0]
    if error is not None:
        raise error
    return value
