"""What a planner's turn says: its text becomes an action, or the reason why it is none."""

from __future__ import annotations

import re
from collections.abc import Collection

from flowkern.agent.memory import Action
from flowkern.checks import shown

LABELS = {"context": "context", "sub_goal": r"sub-?\s?goal", "tool": r"tool(?:\s+name)?"}
# A label stands at the start of a line, in any case, with or without markdown around it. What may
# stand before it is of its own line: else each of many empty lines looks through all that follow.
_LABEL = r"^[ \t\r\xa0>*#\-_`]*+(?:{})[\s*_`]*:[*_`]*[ \t]*"
_ANY = re.compile(
    _LABEL.format("|".join(["justification", *LABELS.values()])), re.IGNORECASE | re.MULTILINE
)
_EACH = {
    name: re.compile(_LABEL.format(label), re.IGNORECASE | re.MULTILINE)
    for name, label in LABELS.items()
}
LONGEST = 20_000  # characters of a turn that are looked at


def parse(text: str, tools: Collection[str]) -> Action | str:
    """The action of a turn that has the lines "Context:", "Sub-Goal:" and "Tool Name:", each up to
    the next label; the last of each counts. Else, in a line, what is wrong with it.
    """
    text, found = text[:LONGEST], {}
    for name, label in _EACH.items():
        *_, last = [None, *label.finditer(text)]
        if last is None:
            return f"the turn has no line {_SHOWN[name]!r}"
        following = _ANY.search(text, last.end())
        found[name] = text[last.end() : following.start() if following else None].strip()
    tool = _tool(found["tool"], tools)
    if tool is None:
        return f"there is no tool {shown(found['tool'])}; there are {', '.join(sorted(tools))}"
    return Action(tool, found["sub_goal"], found["context"])


_SHOWN = {"context": "Context:", "sub_goal": "Sub-Goal:", "tool": "Tool Name:"}


def _tool(said: str, tools: Collection[str]) -> str | None:
    """The tool that was meant, in any case, with or without quotes around its name."""
    name = (said.splitlines() or [""])[0].strip(" \t*_`'\".").casefold().replace(" ", "_")
    return next((tool for tool in tools if tool.casefold() == name), None)
