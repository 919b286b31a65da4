"""Tools by their names and options in a configuration, and the documentation's own one."""

import asyncio
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from flowkern.agent.tools import TOOLS, Limits, load_tool
from flowkern.checks import ConfigError

pytest.importorskip("pydantic", reason="pydantic is not installed: flowkern[agent]")

SHORT = Limits(seconds=0.2, characters=50)


def call(made, **arguments):
    return asyncio.run(made(**arguments))


def look_up(item: str) -> str:
    """Finds an item."""
    return item


def no_hint(a):
    """Has a docstring."""


class Multiplied:
    def __init__(self, by: int, plus: int = 0):
        if by == 13:
            raise ValueError("by: got 13, expected a lucky number")
        self.by, self.plus = by, plus

    def __call__(self, n: int) -> int:
        """Multiplies."""
        return n * self.by + self.plus


OWN = f"{__name__}:Multiplied"


def test_a_tool_of_ones_own_is_loaded_with_its_options():
    made = load_tool(OWN, "times", by=3, seconds=2, characters=10)
    assert (made.name, made.description, made.limits) == ("times", "Multiplies.", Limits(2, 10))
    assert call(made, n=4).text == "12"
    assert load_tool(f"{__name__}:look_up").name == "look_up"


@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("calculater", {}, "agent.tools.t: got 'calculater', .*did you mean 'calculator'"),
        (OWN, {}, "agent.tools.t.by: missing, and has no default"),
        (
            OWN,
            {"by": 1, "pluss": 2},
            "agent.tools.t.pluss: unknown key; did you mean 'agent.tools.t.plus'",
        ),
        (OWN, {"by": 13}, "agent.tools.t.by: got 13, expected a lucky number"),
        (OWN, {"by": 1, "seconds": 0}, "agent.tools.t.seconds: got 0, expected a number above 0"),
        (
            OWN,
            {"by": 1, "characters": "many"},
            "agent.tools.t.characters: got 'many', expected a number",
        ),
        (
            f"{__name__}:look_up",
            {"x": 1},
            "agent.tools.t.x: unknown key; a function takes no options",
        ),
        (f"{__name__}:no_hint", {}, "agent.tools.t: tool t: argument a has no type hint"),
        (f"{__name__}:SHORT", {}, "agent.tools.t: tool .* cannot be called"),
    ],
)
def test_a_tool_that_cannot_be_had_is_refused_by_its_key(kind, options, said):
    with pytest.raises(ConfigError, match=said):
        load_tool(kind, "t", **options)


def test_every_known_tool_is_there():
    for place in TOOLS.values():
        module, attribute = place.split(":")
        assert callable(getattr(import_module(module), attribute))


def test_generator_asks_the_client_that_it_is_given():
    async def client(messages):
        return f"{messages[0]['role']}: {messages[0]['content']}"

    async def silent(messages):
        return " \n"

    async def down(messages):
        raise ConnectionError("connection refused")

    assert call(load_tool("generator", client=client), query="{a} {{b}}").text == "user: {a} {{b}}"
    assert (
        call(load_tool("generator", client=silent), query="q").failure == "the model gave no text"
    )
    assert "connection refused" in call(load_tool("generator", client=down), query="q").failure


ROOT = Path(__file__).parents[2]


def test_the_tool_of_the_documentation(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "agent.md").read_text()
    code = re.search(r"## Your own tool in five lines\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "my_tools.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tools", raising=False)
    assert len(code.splitlines()) == 5
    made = load_tool("my_tools:distance", "distance", seconds=2, characters=500)
    assert (
        made.description == "Converts a distance in kilometres to miles or feet."
        and made.schema["required"] == ["kilometres"]
    )
    assert call(made, kilometres="10").text == "6.21 miles"
    assert call(made, kilometres=1, unit="ells").failure == "KeyError: 'ells'"
    monkeypatch.delitem(sys.modules, "my_tools")
