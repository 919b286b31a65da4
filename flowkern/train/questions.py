"""Questions of a planner: read, and as its agent takes them."""

from __future__ import annotations

from collections.abc import Sequence

from flowkern.agent.memory import Query
from flowkern.checks import ConfigError
from flowkern.train.config import DataConfig
from flowkern.train.data import prompts_of
from flowkern.train.planner_config import PlannerValidation
from flowkern.train.prompts import Prompt
from flowkern.train.validation_config import ANSWERED


def read_questions(data: DataConfig, which: str) -> list[Prompt]:
    """As `prompts_of`. Raises ConfigError for a question without an answer."""
    found = prompts_of(data, which)
    for number, one in enumerate(found, 1):
        if not isinstance(one.get("answer"), str | int | float):
            path = getattr(data, which)
            raise ConfigError(f'data.{which}: question {number} of {path} has no "answer"')
    return found


def require_kinds(options: PlannerValidation, questions: Sequence[Prompt]) -> None:
    """Raise ConfigError for a figure of a kind that no held-out question has."""
    asked = {"metric": [options.metric] if options.metric else [], "collapse": options.collapse}
    kinds = sorted({str(one["kind"]) for one in questions[: options.num_prompts] if "kind" in one})
    for key, name in ((key, name) for key, names in asked.items() for name in names or ()):
        of = next((of for of in ANSWERED[:2] if name.startswith(f"{of}/")), None)
        if of is not None and name.removeprefix(f"{of}/") not in kinds:
            there = ", ".join(kinds) or "none"
            raise ConfigError(
                f"validation.{key}: got {name}, but the kinds of questions that are asked are "
                f"{there}"
            )


def query_of(question: Prompt, number: int) -> Query:
    rest = {name: value for name, value in question.items() if name not in ("prompt", "answer")}
    return Query(question["prompt"], str(question["answer"]), number, rest)
