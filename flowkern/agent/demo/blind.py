"""Whom the warm-up imitates: a planner that knows what a turn looks like and in which order turns
make sense, and draws the operation at random. It answers a fifth of the questions by chance, so
that what it takes to answer all of them is learned from rewards alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from flowkern.agent.demo.system import GENERATOR, command, references
from flowkern.agent.demo.world import ATTRIBUTES, OPERATIONS, Catalogue, question
from flowkern.agent.memory import Action, Memory, Step

SENSIBLE, ASKED, STOPS = 0.9, 0.9, 0.85
"""How often a search comes before a calculation, is for the attribute that was asked for, and the
result of a calculation is the answer."""


def action(memory: Memory, chance: random.Random) -> Action:
    """The next turn."""
    about = memory.query.metadata
    items, numbers = len(about["items"]), len(about["numbers"])
    results = [i for i, step in enumerate(memory.steps, 1) if step.failure is None]
    searched = [i for i in results if memory.steps[i - 1].tool == "search"]
    calculated = [i for i in results if memory.steps[i - 1].tool == "calculator"]
    if len(searched) < items and chance.random() < SENSIBLE:
        return _search(memory, len(searched) + 1, chance)
    needed = items + numbers - 1  # calculations, of two operands each
    if len(calculated) >= needed and chance.random() < STOPS:
        return Action(GENERATOR, "answer", f"step {calculated[-1]}")
    operands = [f"step {i}" for i in results] + [f"number {i}" for i in range(1, numbers + 1)]
    if len(operands) < 2:
        return _search(memory, chance.randint(1, items), chance)
    if needed > 1 and len(calculated) < needed:  # in the order of the question
        first = f"step {calculated[-1]}" if calculated else "number 1"
        chosen = [first, f"number {len(calculated) + 2}"]
    elif len(searched) == 2 == len(operands):
        chosen = operands
    else:
        chosen = chance.sample(operands, 2)
    return Action("calculator", chance.choice([*OPERATIONS]), " ".join(chosen))


def _search(memory: Memory, item: int, chance: random.Random) -> Action:
    asked = next(word for word in memory.query.text.split() if word in ATTRIBUTES)
    other = next(name for name in ATTRIBUTES if name != asked)
    goal = asked if chance.random() < ASKED else other
    return Action("search", goal, f"item {item}")


def said(action: Action) -> str:
    """An action as a turn says it."""
    return f"context {action.context} goal {action.sub_goal} tool {action.tool}"


def looked_up(memory: Memory, action: Action, catalogue: Catalogue) -> Step:
    """What the executor makes of an action, without its tools."""
    if action.tool == GENERATOR:
        return Step(GENERATOR, action.sub_goal, "", str(references(memory, action.context)[0]))
    arguments = next(iter(command(memory, action).values()))
    if action.tool == "search":
        item = references(memory, action.context)[0]
        return Step(
            "search", action.sub_goal, arguments, str(catalogue.values[item, action.sub_goal])
        )
    a, sign, b = arguments.split()
    result = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(a), int(b))
    return Step("calculator", action.sub_goal, arguments, str(result))


def trajectories(
    kinds: Sequence[str], catalogue: Catalogue, chance: random.Random, max_turns: int = 5
) -> Iterator[tuple[Memory, list[Action]]]:
    """Endlessly: half of them about a catalogue of their own."""
    while True:
        about = catalogue if chance.random() < 0.5 else Catalogue.drawn(catalogue.name, chance)
        memory, actions = Memory(question(chance.choice(kinds), about, chance)), []
        while len(actions) < max_turns and not (actions and actions[-1].tool == GENERATOR):
            actions.append(action(memory, chance))
            memory.add(looked_up(memory, actions[-1], about))
        yield memory, actions
