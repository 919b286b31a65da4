"""Tools of an agent: what a planner may ask for. This file has the lookup by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flowkern.agent.options import built
from flowkern.agent.tools.tool import Limits, Result, Tool, ToolFailure, tool
from flowkern.checks import ConfigError, shown
from flowkern.lookup import load

__all__ = ["TOOLS", "Limits", "Result", "Tool", "ToolFailure", "load_tool", "tool"]

TOOLS = {
    "calculator": "flowkern.agent.tools.calculator:Calculator",
    "search": "flowkern.agent.tools.search:Search",
    "generator": "flowkern.agent.tools.generator:Generator",
    "web_search": "flowkern.agent.tools.web:WebSearch",
    "web_page": "flowkern.agent.tools.web:WebPage",
    "wikipedia": "flowkern.agent.tools.wikipedia:Wikipedia",
    "smolagents": "flowkern.agent.tools.adapters:SmolagentsTool",
    "mcp": "flowkern.agent.tools.adapters:McpTool",
    "python": "flowkern.agent.tools.python:Python",
}
"""Short names; the modules behind them are imported only when asked for."""

LIMITS = ("seconds", "characters")


def load_tool(kind: str, name: str | None = None, /, client: Any = None, **options: Any) -> Tool:
    """The tool that `kind` stands for: a key of `TOOLS`, or "module:attribute" of any module.

    A class is built with `options`; a function, or a `Tool`, takes none. Every tool takes `seconds`
    and `characters`, its limits; a class may have options of these names itself. name: what a
    configuration, and so the planner, calls it; None: the tool's own. client: given to a class that
    has a parameter `client` and no option of it.
    Raises ConfigError, naming agent.tools.NAME or the option, for what there is not, cannot be a
    tool, and for options that it does not have, lacks or refuses.
    """
    key = f"agent.tools.{name or kind}"
    found = load(kind, TOOLS, key)
    own = inspect.signature(found).parameters if inspect.isclass(found) else {}
    given = {k: v for k, v in options.items() if k not in LIMITS or k in own}
    if inspect.isclass(found):
        found = built(found, given, key, client, also=LIMITS)
    elif given:
        raise ConfigError(
            f"{key}.{next(iter(given))}: unknown key; a function takes no options: make it a "
            "class, whose constructor has it"
        )
    try:
        made = found if isinstance(found, Tool) else tool(found, name=name)
        made.limits = _limits(made.limits, {k: options[k] for k in options if k not in own}, key)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error) if key in str(error) else f"{key}: {error}") from error
    made.name = name or made.name
    return made


def _limits(limits: Limits, options: Mapping[str, Any], key: str) -> Limits:
    given = {k: options[k] for k in LIMITS if k in options}
    for option, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{key}.{option}: got {shown(value)}, expected a number")
    try:
        return Limits(**{"seconds": limits.seconds, "characters": limits.characters, **given})
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from error
