"""Questions of a planner: read, and as its agent takes them."""

from __future__ import annotations

from flowkern.agent.memory import Query
from flowkern.checks import ConfigError
from flowkern.train.config import DataConfig
from flowkern.train.data import prompts_of
from flowkern.train.prompts import Prompt


def read_questions(data: DataConfig, which: str) -> list[Prompt]:
    """As `prompts_of`. Raises ConfigError for a question without an answer."""
    found = prompts_of(data, which)
    for number, one in enumerate(found, 1):
        if not isinstance(one.get("answer"), str | int | float):
            path = getattr(data, which)
            raise ConfigError(f'data.{which}: question {number} of {path} has no "answer"')
    return found


def query_of(question: Prompt, number: int) -> Query:
    rest = {name: value for name, value in question.items() if name not in ("prompt", "answer")}
    return Query(question["prompt"], str(question["answer"]), number, rest)
