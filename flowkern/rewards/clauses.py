"""GenEval's clauses on boxes that a detector found: how many of a class, of which colour, where
(arXiv 2310.11513). No image and no network: what was found goes in, whether it is right comes out.

A row of prompts has `include`: [{"class", "count", "color"?, "position"?: [relation, index]}],
where index is a clause before it, and `exclude`: [{"class", "count"}].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from flowkern.checks import is_integer, shown

__all__ = ["RELATIONS", "Found", "Thing", "Verdict", "check_clauses", "judge", "relations"]

RELATIONS = ("left of", "right of", "above", "below")
OVERLAP = 0.1
"""Of the sum of two sizes: an offset within it is none."""


class Thing(NamedTuple):
    """What a detector found."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom; y grows downwards."""
    color: str | None = None
    """None: nobody asked."""


Found: TypeAlias = Mapping[str, Sequence[Thing]]
"""By class, the surest first."""


class Verdict(NamedTuple):
    """As flow_grpo's server names them: `scores`, `rewards`, `strict_rewards`."""

    score: float
    """The mean over what the include clauses ask for, at most 1; it is negative where far too much
    was found. `exclude` does not enter."""
    correct: bool
    """The benchmark's rule: at least as many of each, and less than excluded."""
    strict: bool
    """Exactly as many of each; `exclude` does not enter."""


def judge(found: Found, row: Mapping[str, Any]) -> Verdict:
    """Of a row that `check_clauses` let pass."""
    score, strict = _graded(found, row["include"])
    return Verdict(score, _is_correct(found, row), strict)


def _graded(found: Found, clauses: Sequence[Mapping[str, Any]]) -> tuple[float, bool]:
    """The score, and whether all is exactly so."""
    parts: list[float] = []
    groups: list[Sequence[Thing] | None] = []
    for clause in clauses:
        want, things = clause["count"], found.get(clause["class"], ())
        parts.append(_closeness(want, len(things)))
        is_met = len(things) == want
        if not is_met and ("color" in clause or "position" in clause):
            parts.append(0.0)
        if is_met and "color" in clause:
            number = _of_color(things, clause["color"])
            parts.append(_closeness(want, number))
            is_met = number == want
        if is_met and "position" in clause:
            relation, index = clause["position"]
            is_met = _stand(things, relation, groups[index])
            # A wrong place counts 0 and then 1, and 0 alone without a target: so it was released,
            # and what is compared with published runs has to have it.
            parts += [1.0] if is_met else [0.0] if groups[index] is None else [0.0, 1.0]
        groups.append(things if is_met else None)
    return sum(parts) / len(parts), None not in groups


def _is_correct(found: Found, row: Mapping[str, Any]) -> bool:
    groups: list[Sequence[Thing] | None] = []
    for clause in row["include"]:
        want = clause["count"]
        things = found.get(clause["class"], ())[:want]
        is_met = len(things) == want
        if is_met and "color" in clause:
            is_met = _of_color(things, clause["color"]) == want
        if is_met and "position" in clause:
            relation, index = clause["position"]
            is_met = _stand(things, relation, groups[index])
        groups.append(things if is_met else None)
    excluded = row.get("exclude") or ()
    return None not in groups and all(len(found.get(c["class"], ())) < c["count"] for c in excluded)


def _closeness(want: int, number: int) -> float:
    return 1 - abs(want - number) / want


def _of_color(things: Sequence[Thing], color: str) -> int:
    return sum(thing.color == color for thing in things)


def _stand(things: Sequence[Thing], relation: str, targets: Sequence[Thing] | None) -> bool:
    """Does each stand so to each of the targets? Not where there are none."""
    if targets is None:
        return False
    return all(relation in relations(a.box, b.box) for a in things for b in targets)


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a is, seen from box b: none, one or two of `RELATIONS`, by the direction between
    their middles once a tenth of both sizes is taken off.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    left = [max(abs(o) - OVERLAP * s, 0.0) for o, s in zip(offset, sizes, strict=True)]
    if max(left) < 1e-3:
        return set()
    x, y = (
        math.copysign(one, o) / math.hypot(*offset) for one, o in zip(left, offset, strict=True)
    )
    is_so = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {relation for relation, so in zip(RELATIONS, is_so, strict=True) if so}


def check_clauses(row: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the place, for metadata that has no clauses of this form."""
    for key in ("include", "exclude"):
        clauses = row.get(key)
        if key == "exclude" and clauses is None:
            continue
        if not isinstance(clauses, list | tuple) or (key == "include" and not clauses):
            raise ValueError(f"metadata[{key!r}]: got {shown(clauses)}, expected a list of clauses")
        for i, clause in enumerate(clauses):
            wrong = _wrong(clause, i if key == "include" else None)
            if wrong:
                raise ValueError(f"metadata[{key!r}][{i}]: got {shown(clause)}, expected {wrong}")


def _wrong(clause: Any, place: int | None) -> str | None:
    """What was expected instead. place: among those that a position may refer to."""
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        return "{class, count, ...}"
    if not is_integer(clause.get("count")) or clause["count"] < 1:
        return "count to be a whole number above 0"
    if place is None:
        return None
    if "color" in clause and not isinstance(clause["color"], str):
        return "color to be a word"
    if "position" in clause:
        position = clause["position"]
        if not isinstance(position, list | tuple) or len(position) != 2:
            return "position to be [relation, clause]"
        if position[0] not in RELATIONS:
            return f"a relation of {', '.join(RELATIONS)}"
        if not is_integer(position[1]) or not 0 <= position[1] < place:
            return "position to name a clause before it, the first being 0"
    return None
