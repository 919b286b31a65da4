"""Catalogues, questions about them, and the words of both: numbers are spelled digit by digit.

A turn of the planner names what it means, "item 1" of the question or the result of "step 2", and
never copies a number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flowkern.agent.memory import Query

ITEMS = (
    "apple bag ball bell belt boat book boot bowl box brush bucket cable candle chair clock coat "
    "comb cup desk door drum fan flute fork glove hammer hat kettle kite knife lamp lock mirror "
    "needle pan pear pen pillow plate ring rope rug saw scarf shelf shoe soap spoon vase"
).split()
ATTRIBUTES = ("price", "weight")
OPERATIONS = {"plus": "+", "minus": "-", "times": "*"}
LOOKUP = ("total", "difference", "times")
"""The kinds of the demo: two to three turns of tools; the warm-up draws the operation at random."""
HARD = ("change", "chain")
"""One whose operands have an order that the warm-up draws at random too, and one without a
search."""


@dataclass(frozen=True)
class Catalogue:
    """What one of each item costs and weighs."""

    name: str
    values: dict[tuple[str, str], int] = field(default_factory=dict)
    """(item, attribute) -> 2 to 99."""

    @classmethod
    def drawn(cls, name: str, chance: random.Random) -> Catalogue:
        values = {(i, a): chance.randint(2, 99) for i in ITEMS for a in ATTRIBUTES}
        return cls(name, values)

    def passages(self) -> list[str]:
        """What a search finds."""
        return [
            f"In catalogue {self.name} the {attribute} of one {item} is {value}."
            for (item, attribute), value in self.values.items()
        ]


def question(kind: str, catalogue: Catalogue, chance: random.Random, number: int = 0) -> Query:
    """One of a kind, with its answer; metadata: kind, catalogue, and the items and numbers that its
    text names, in order."""
    a, b = chance.sample(ITEMS, 2)
    of = chance.choice(ATTRIBUTES)
    n, m = chance.randint(2, 9), chance.randint(2, 9)
    va, vb = catalogue.values[a, of], catalogue.values[b, of]
    if kind == "total":
        text, answer, items, numbers = f"total {of} of {a} and {b}", va + vb, [a, b], []
    elif kind == "difference":
        if va < vb:
            a, b, va, vb = b, a, vb, va
        text, answer, items, numbers = f"how much more {of} is {a} than {b}", va - vb, [a, b], []
    elif kind == "times":
        text, answer, items, numbers = f"{of} of {n} {a}", n * va, [a], [n]
    elif kind == "change":
        sign = chance.choice([1, -1])
        word = "more" if sign > 0 else "less"
        text, answer, items, numbers = f"{n} {word} than {of} of {a}", va + sign * n, [a], [n]
    elif kind == "chain":
        k = chance.randint(2, 9)
        text, answer = f"sum of {n} and {m} times {k}", (n + m) * k
        items, numbers = [], [n, m, k]
    else:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(LOOKUP + HARD)}")
    about = {"kind": kind, "catalogue": catalogue.name, "items": items, "numbers": numbers}
    return Query(text, str(answer), number, about)


def questions(
    kinds: Sequence[str], catalogue: Catalogue, count: int, chance: random.Random
) -> list[Query]:
    """As many of each kind, in turn; all of them different while there are others."""
    found: dict[str, Query] = {}
    tries = _endless(kinds, catalogue, chance)
    while len(found) < count:
        for _ in range(100):
            one = next(tries)
            if one.text not in found:
                break
        else:
            raise ValueError(f"count: got {count}, there are not so many questions")
        found[one.text] = Query(one.text, one.answer, len(found), one.metadata)
    return list(found.values())


def _endless(kinds: Sequence[str], catalogue: Catalogue, chance: random.Random) -> Iterator[Query]:
    while True:
        for kind in kinds:
            yield question(kind, catalogue, chance)


def vocabulary() -> list[str]:
    """Every word that a prompt or a turn has, after the special ones."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    said = "total of and how much more is than less sum question turn left"
    turn = "context goal tool step item number answer search calculator generator failed result"
    return [
        *special,
        *"0123456789-",
        *ITEMS,
        *ATTRIBUTES,
        *OPERATIONS,
        *said.split(),
        *turn.split(),
    ]
