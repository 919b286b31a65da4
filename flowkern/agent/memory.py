"""What an agent knows while it works on one question. A memory is made for every trajectory:
nothing of one question is ever seen by another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Query:
    """A question with its answer, which rewards alone look at."""

    text: str
    answer: str
    id: int = 0
    """Global, the same on every rank: the group of its trajectories."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else its file says of it; "kind" groups the figures of an evaluation."""


@dataclass(frozen=True)
class Action:
    """What a turn of the planner asked for."""

    tool: str
    sub_goal: str
    context: str


@dataclass(frozen=True)
class Step:
    """What became of an action."""

    tool: str
    """As the planner named it; empty where its turn could not be read."""
    sub_goal: str
    command: str
    """What the tool was called with."""
    result: str
    """What it said, or why there is nothing: the planner sees it either way."""
    failure: str | None = None
    """In a line, why it did not work; None: it did."""

    @classmethod
    def failed(cls, reason: str, tool: str = "", sub_goal: str = "", command: str = "") -> Step:
        """A step that did not work: the reason is its result too."""
        return cls(tool, sub_goal, command, f"failed: {reason}", reason)


@dataclass
class Memory:
    """The question and the steps so far, in order. Its texts are values: never a template, and
    never a format string."""

    query: Query
    steps: list[Step] = field(default_factory=list)

    def add(self, step: Step) -> None:
        self.steps.append(step)
