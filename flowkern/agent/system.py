"""An agent without its planner: what a question is worked on with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flowkern.agent.memory import Action, Memory, Step
from flowkern.lookup import load

SYSTEMS = {
    "llm": "flowkern.agent.modules:system",
    "demo": "flowkern.agent.demo.system:system",
}
"""By the name that `agent.system` has; or "module:attribute" of one's own: a function that takes
the options `agent.modules`, `agent.tools` and `agent.prompts` of the configuration as the keyword
arguments options, tools and prompts, and returns a `System`."""


@dataclass(frozen=True)
class System:
    """Four callables around the planner, and its tools. None of them raises for what a tool or a
    model does: that is a failed step, or an empty answer."""

    tools: Mapping[str, Any]
    """name -> `tools.Tool`."""
    prompt: Callable[[Memory, int], str | list[dict[str, str]]]
    """What the planner is asked: of the memory and the number of turns left, this one included; a
    text, or the messages of a chat."""
    parse: Callable[[str, Collection[str]], Action | str]
    """A turn and the names of the tools -> what it asks for, or in a line what is wrong with it."""
    executor: Callable[[Memory, Action, Mapping[str, Any]], Awaitable[Step]]
    verifier: Callable[[Memory], Awaitable[bool]]
    """Is what the memory holds enough?"""
    generator: Callable[[Memory], Awaitable[str]]
    """The answer."""


def load_tools(options: Mapping[str, Mapping[str, Any]], client: Any = None) -> dict[str, Any]:
    """The tools of `agent.tools`, by the name that a planner calls them: of the options of each,
    `kind` says what makes it; without, its name does. Raises ConfigError naming the key."""
    from flowkern.agent.tools import load_tool

    found = {}
    for name, its in options.items():
        rest = {key: value for key, value in its.items() if key != "kind"}
        found[name] = load_tool(its.get("kind", name), name, client, **rest)
    return found


def load_system(
    name: str,
    options: Mapping[str, Any] | None = None,
    tools: Mapping[str, Any] | None = None,
    prompts: str | None = None,
) -> System:
    """The system of a configuration. Raises ConfigError naming the key."""
    make = load(name, SYSTEMS, "agent.system")
    return make(options=dict(options or {}), tools=dict(tools or {}), prompts=prompts)
