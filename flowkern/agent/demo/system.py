"""The demo's executor, verifier and generator: rules, so that the planner alone decides."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from flowkern.agent.demo.world import ATTRIBUTES, OPERATIONS
from flowkern.agent.memory import Action, Memory, Step
from flowkern.agent.prompts import Prompts
from flowkern.agent.system import System, load_tools
from flowkern.checks import ConfigError

GENERATOR = "generator"
TURN = re.compile(r"context (?P<context>[a-z0-9 ]+) goal (?P<goal>\S+) tool (?P<tool>\S+)")
NUMBER = re.compile(r"-?\d+")
LONGEST = 12  # digits of a result


def parse(text: str, tools: Collection[str]) -> Action | str:
    """The action of "context ... goal ... tool ...", or what is wrong with it."""
    found = TURN.fullmatch(text.strip())
    if found is None:
        return "the turn is not of the form: context ... goal ... tool ..."
    if found["tool"] not in tools:
        return f"there is no tool {found['tool']}"
    return Action(found["tool"], found["goal"], found["context"])


def references(memory: Memory, context: str) -> list[str | int]:
    """What the words of a context stand for: items by their names, numbers as they are. Raises
    LookupError, of a line, for one that stands for nothing."""
    words, found = context.split(), []
    about = memory.query.metadata
    kinds: dict[str, list[Any]] = {
        "item": about["items"],
        "number": about["numbers"],
        "step": [None if s.failure else int(s.result) for s in memory.steps],
    }
    for kind, place in zip(words[::2], [*words[1::2], ""][: len(words[::2])], strict=True):
        known = kinds.get(kind, [])
        value = known[int(place) - 1] if place.isdigit() and 0 < int(place) <= len(known) else None
        if value is None:
            raise LookupError(f"there is no {kind} {place}")
        found.append(value)
    return found


def command(memory: Memory, action: Action) -> dict[str, str]:
    """The arguments that the tool is called with. Raises LookupError where the action makes no
    sense for it."""
    values = references(memory, action.context)
    if action.tool == "search":
        if len(values) != 1 or not isinstance(values[0], str) or action.sub_goal not in ATTRIBUTES:
            raise LookupError("a search is for the price or the weight of one item")
        catalogue = memory.query.metadata["catalogue"]
        return {"query": f"catalogue {catalogue} {action.sub_goal} {values[0]}"}
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise LookupError("a calculation is of two numbers")
    if action.sub_goal not in OPERATIONS:
        raise LookupError(f"there is no operation {action.sub_goal}")
    return {"expression": f"{values[0]} {OPERATIONS[action.sub_goal]} {values[1]}"}


async def executor(memory: Memory, action: Action, tools: Mapping[str, Any]) -> Step:
    """Resolve what the planner named, and call the tool; of what it says the last number counts."""
    try:
        if action.tool == GENERATOR:
            value = references(memory, action.context)
            if len(value) != 1 or not isinstance(value[0], int):
                raise LookupError("an answer is the result of one step")
            return Step(GENERATOR, action.sub_goal, "", str(value[0]))
        arguments = command(memory, action)
    except LookupError as error:
        return Step.failed(str(error), action.tool, action.sub_goal)
    found = await tools[action.tool](**arguments)
    said = next(iter(arguments.values()))
    if found.failure is not None:
        return Step.failed(found.failure, action.tool, action.sub_goal, said)
    first = found.text.strip().splitlines()[0] if found.text.strip() else ""
    numbers = NUMBER.findall(first)
    if not numbers or len(numbers[-1]) > LONGEST:
        return Step.failed("no number of a sensible size", action.tool, action.sub_goal, said)
    return Step(action.tool, action.sub_goal, said, numbers[-1])


async def verifier(memory: Memory) -> bool:
    """Has the planner called for the answer?"""
    last = memory.steps[-1]
    return last.tool == GENERATOR and last.failure is None


async def generator(memory: Memory) -> str:
    """The result that it called for; else nothing."""
    last = memory.steps[-1]
    return last.result if last.tool == GENERATOR and last.failure is None else ""


def system(
    options: Mapping[str, Any], tools: Mapping[str, Any], prompts: str | None = None
) -> System:
    """See `system.SYSTEMS`. tools: search and calculator, with their options."""
    if options:
        raise ConfigError(f"agent.modules.{min(options)}: unknown key; the demo has none")
    if {*tools} != {"search", "calculator"}:
        raise ConfigError(f"agent.tools: got {sorted(tools)}, expected search and calculator")
    templates = Prompts(prompts)
    return System(
        tools={**load_tools(tools), GENERATOR: None},
        prompt=lambda memory, left: templates.render("demo", memory=memory, turns_left=left),
        parse=parse,
        executor=executor,
        verifier=verifier,
        generator=generator,
    )
