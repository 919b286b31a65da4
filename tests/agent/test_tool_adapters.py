"""Tools written for smolagents and MCP servers, by objects with their fields."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest

from flowkern.agent.tools import load_tool
from flowkern.checks import ConfigError


class Greets:
    """As a smolagents.Tool 1.26 is written."""

    name = "greets"
    description = """Greets
    someone."""
    inputs: ClassVar = {
        "who": {"type": "string", "description": "A name."},
        "times": {"type": "integer", "description": "How often.", "nullable": True},
        "picture": {"type": "image", "description": "Of it.", "nullable": True},
    }
    output_type = "string"
    is_initialized = False

    def setup(self):
        self.is_initialized = True

    def forward(self, who, times=1, picture=None):
        assert self.is_initialized
        return f"hello {who}" * (times or 1)

    def __call__(self, *args, sanitize_inputs_outputs=False, **kwargs):
        if not self.is_initialized:
            self.setup()
        return self.forward(*args, **kwargs)


def test_smolagents():
    made = load_tool("smolagents", tool=f"{__name__}:Greets")
    assert (made.name, made.description) == ("greets", "Greets someone.")
    assert made.schema["required"] == ["who"]
    assert made.schema["properties"] == {
        "who": {"type": "string", "description": "A name."},
        "times": {"type": ["integer", "null"], "description": "How often."},
        "picture": {"description": "Of it."},
    }
    assert asyncio.run(made(who="you", times=2)).text == "hello youhello you"
    assert asyncio.run(made(who=3)).failure == "argument who: expected string, got 3"
    assert asyncio.run(made(who="a", times=True)).failure.startswith("argument times: expected")
    assert asyncio.run(made()).failure == "argument who is missing"
    assert asyncio.run(made(who="a", x=1)).failure.startswith(
        "argument x is unknown, known are who"
    )
    with pytest.raises(
        ConfigError, match="agent.tools.smolagents.tool: got .* expected smolagents'"
    ):
        load_tool("smolagents", tool=f"{__name__}:asyncio")


def text(said):
    return SimpleNamespace(type="text", text=said)


class Server:
    """A client of mcp 2.3, as far as it is used."""

    made = 0

    async def list_tools(self, *, cursor=None):
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        names = ["double", "fail"] if cursor is None else ["draw", "hang"]
        tools = [SimpleNamespace(name=n, description=None, input_schema=schema) for n in names]
        return SimpleNamespace(tools=tools, next_cursor="2" if cursor is None else None)

    async def call_tool(self, name, arguments):
        n = arguments["n"]
        content = [text(str(2 * n)), text("done")] if name == "double" else [text("no\nluck")]
        if name == "draw":
            content = [SimpleNamespace(type="image", data="")]
        if name == "hang":
            await asyncio.Event().wait()
        return SimpleNamespace(content=content, is_error=name == "fail")


@asynccontextmanager
async def connect():
    Server.made += 1
    yield Server()


def test_mcp():
    def called(name, **options):
        return asyncio.run(load_tool("mcp", server="x", tool=name, connect=connect, **options)(n=4))

    assert called("double").text == "8\ndone"
    assert called("fail").failure == "no luck"
    assert called("draw").failure == "the output is no text but image"
    assert called("hang", seconds=0.1).failure == "it took more than 0.1 s"
    made = load_tool("mcp", "mine", server="x", tool="double", connect=connect)
    before = Server.made
    for _ in range(2):  # a connection of each call's own: event loops come and go
        assert asyncio.run(made(n=1)).text == "2\ndone"
    assert made.name == "mine" and Server.made == before + 2
    assert asyncio.run(made(n="1")).failure == "argument n: expected integer, got '1'"


def test_an_mcp_server_that_cannot_be_used_is_refused():
    with pytest.raises(
        ConfigError, match="agent.tools.mcp.tool: got 'treble', 'x' has double, draw"
    ):
        load_tool("mcp", server="x", tool="treble", connect=connect)

    @asynccontextmanager
    async def down():
        raise ConnectionRefusedError("nobody\nthere")
        yield

    with pytest.raises(
        ConfigError, match="agent.tools.mcp.server: 'x': ConnectionRefusedError: nobody"
    ):
        load_tool("mcp", server="x", tool="double", connect=down)


def test_mcp_is_asked_for_by_name(monkeypatch):
    from flowkern.agent.tools import adapters

    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"an MCP server needs mcp: pip install 'flowkern\[mcp\]'"
    ):
        load_tool("mcp", server="http://127.0.0.1:9/mcp", tool="x")
