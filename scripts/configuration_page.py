"""docs/configuration.md, every key of a configuration, from the fields and their docstrings.

    python scripts/configuration_page.py [--check]

Writes the page; with --check changes nothing and exits 1 where it is another. What a key is stands
once, below its field; the page is never edited by hand.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flowkern.checks import Held, Range, held  # noqa: E402
from flowkern.lookup import load  # noqa: E402
from flowkern.rewards import REWARDS  # noqa: E402
from flowkern.rl.algorithms import ALGORITHMS, PLANNERS, recipe  # noqa: E402
from flowkern.rl.recipe import (  # noqa: E402
    SDES,
    EvenGridRecipe,
    PolicyRecipe,
    Recipe,
    SdeType,
    ShiftedRecipe,
    StepRecipe,
)
from flowkern.train.config import Config  # noqa: E402
from flowkern.train.fields import Collection, Origin, Phrase, Place, Section, Text  # noqa: E402
from flowkern.train.planner_config import PlannerConfig  # noqa: E402
from flowkern.train.reward_config import RewardConfig  # noqa: E402

PAGE = ROOT / "docs/configuration.md"
REQUIRED = dataclasses.MISSING
HEAD = """# Configuration

Every key, made by `python scripts/configuration_page.py` from the fields of the code. Other keys,
other types and numbers outside of a range are refused before a run begins, by their full name.

    flowkern train FIRST.yaml [LAST.yaml ...] [key.path=value ...]

Files are merged from the first to the last; the files that one `extends` come before it. Then come
the keys of the command line, whose values are YAML: `train.steps=50`, `'reward={pickscore: {}}'`.
What a run used lies in its directory, `config.yaml`.

"""
OF_REWARDS = (
    "By names of your choice, `reward: {NAME: {...}}`; what each is, and what its options mean: "
    "docs/rewards.md."
)
OF_ALGORITHMS = (
    "`algorithm.name` is one of those below, or `module:Class` of your own (docs/algorithms.md). "
    "Defaults are the papers'."
)
OF_PLANNERS = (
    "Where `algorithm.name` is one of an agent's planner (docs/agent.md); `train`, `lora` and the "
    "keys of the run are as above."
)
WORDS: dict[Any, str] = {
    Text: "text",
    Phrase: "text, also none",
    Place: "a path",
    Origin: "a directory, or OWNER/NAME of the hub",
    SdeType: ", ".join(f"`{one}`" for one in (*SDES, "module:function")),
    Collection: "a file, a directory, or OWNER/NAME of the hub",
    int: "integer",
    float: "number",
    bool: "`true` or `false`",
    str: "text",
    type(None): "`null`",
}


class Key(NamedTuple):
    """One line of a table."""

    name: str
    kind: str
    default: Any
    text: str


def keys(owner: type) -> list[Key]:
    """Of a section, or of a recipe; those that hold sections are left out."""
    hints, said = typing.get_type_hints(owner, include_extras=True), docstrings(owner)
    allowed = held(owner) if dataclasses.is_dataclass(owner) else stated(owner)
    return [
        Key(name, in_words(hints[name], allowed.get(name)), default, said.get(name, ""))
        for name, default in defaults(owner)
        if not sections_in(hints[name])
    ]


def defaults(owner: type) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(owner):
        for item in dataclasses.fields(owner):
            if item.init:
                made = item.default_factory
                yield item.name, item.default if made is REQUIRED else made()
    else:
        for name, field in owner.model_fields.items():  # type: ignore[attr-defined]
            yield (
                name,
                REQUIRED if field.is_required() else field.get_default(call_default_factory=True),
            )


def stated(section: type[Section]) -> dict[str, Held]:
    notes = {name: field.metadata for name, field in section.model_fields.items()}
    return {name: note for name, found in notes.items() for note in found if isinstance(note, Held)}


def docstrings(owner: type) -> dict[str, str]:
    """The string below each field; of a class's own before those that it derives from."""
    found: dict[str, str] = {}
    for kind in reversed(owner.__mro__):
        if not kind.__module__.startswith("flowkern."):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def sections_in(hint: Any) -> list[type]:
    """The sections that a field holds, or may hold."""
    inner = [hint, *typing.get_args(hint)]
    return [one for one in inner if isinstance(one, type) and issubclass(one, Section)]


def in_words(hint: Any, allowed: Range | None = None) -> str:
    """A type, with its range."""
    if typing.get_origin(hint) is typing.Annotated and hint not in WORDS:
        return in_words(typing.get_args(hint)[0], allowed)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return ", or ".join(in_words(one, allowed) for one in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{one}`" for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {in_words(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    word = WORDS.get(hint, str(getattr(hint, "__name__", hint)))
    return word + (f", {span(allowed, hint)}" if allowed and hint in (int, float) else "")


def span(allowed: Range, kind: type) -> str:
    is_above = allowed.above and kind is not int
    low = f"{'above ' if is_above else ''}{number(allowed.low + (allowed.above and kind is int))}"
    high = min(allowed.high, allowed.most)
    if high == float("inf"):
        return low if is_above else f"at least {low}"
    return f"{low} to {'below ' if allowed.below else ''}{number(high)}"


def number(value: float) -> str:
    return f"{value}" if isinstance(value, int) else f"{value:g}"


def shown(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    is_plain = isinstance(value, str) and re.fullmatch(r"[\w./:-]+", value)
    return f"`{value}`" if is_plain else f"`{json.dumps(value, default=written)}`"


def written(value: Any) -> Any:
    """What JSON has no word for; a default that is made anew for each stands for an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def prose(text: str) -> str:
    """A docstring as a cell of a table: pages become links, Python's None is YAML's null."""
    text = re.sub(r"\bNone\b", "`null`", re.sub(r"([|*<])", r"\\\1", text))
    text = re.sub(r"(?<![\w`])_(?=\w)", r"\\_", text)
    return re.sub(r"docs/([\w/]+\.md)", r"[\1](\1)", text)


def table(rows: list[Key]) -> str:
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    lines += [f"| `{r.name}` | {r.kind} | {shown(r.default)} | {prose(r.text)} |" for r in rows]
    return "\n".join(lines) + "\n\n"


def section(title: str, text: str, rows: list[Key], depth: int = 2) -> str:
    return f"{'#' * depth} {title}\n\n" + (f"{prose(text)}\n\n" if text else "") + table(rows)


def named(prefix: str, rows: list[Key]) -> list[Key]:
    return [row._replace(name=f"{prefix}.{row.name}") for row in rows]


def of_images() -> str:
    said, page = docstrings(Config), ""
    hints = typing.get_type_hints(Config, include_extras=True)
    top = [key for key in keys(Config) if key.name not in ("reward", "algorithm")]
    page += section("Of the run", "", top)
    for name in Config.model_fields:
        for kind in sections_in(hints[name]):
            page += section(name, said[name], named(name, keys(kind)))
    return page + of_rewards() + of_algorithms()


def of_rewards() -> str:
    page = section("reward", OF_REWARDS, named("reward.NAME", keys(RewardConfig)))
    page += "Beside these, the options of each:\n\n| reward | options |\n| --- | --- |\n"
    for name in sorted(REWARDS):
        parameters = inspect.signature(load(name, REWARDS)).parameters.values()
        options = [
            f"`{one.name}`" + ("" if one.default is one.empty else f" {shown(one.default)}")
            for one in parameters
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and one.name != "name"
        ]
        page += f"| `{name}` | {', '.join(options) or 'none'} |\n"
    return page + "\n"


def of_algorithms() -> str:
    kinds = {name: {key.name: key for key in keys(recipe(name))} for name in sorted(ALGORITHMS)}
    shared: dict[str, Key] = {}
    for base in (Recipe, StepRecipe, PolicyRecipe, ShiftedRecipe, EvenGridRecipe):
        shared |= {key.name: key for key in keys(base) if key.name not in shared}
    page = f"## algorithm\n\n{prose(OF_ALGORITHMS)}\n\n### Options of several\n\n"
    page += "| key | type | |\n| --- | --- | --- |\n"
    page += "".join(
        f"| `algorithm.{k.name}` | {k.kind} | {prose(k.text)} |\n" for k in shared.values()
    )
    page += "\n"
    for name, found in kinds.items():
        said = [
            key._replace(kind="", text="")
            if key.name in shared and key.text == shared[key.name].text
            else key
            for key in found.values()
        ]
        page += section(name, "", named("algorithm", said), 3)
    return page


def of_planners() -> str:
    """What differs from a run on images, and is not there."""
    page = f"## An agent's planner\n\n{prose(OF_PLANNERS)}\n\n"
    hints, said = (
        typing.get_type_hints(PlannerConfig, include_extras=True),
        docstrings(PlannerConfig),
    )
    for name in ("model", "data", "agent", "validation"):
        (kind,) = sections_in(hints[name])
        rows = keys(kind)
        inner = typing.get_type_hints(kind, include_extras=True)
        for part in kind.model_fields:
            for one in sections_in(inner[part]):
                rows += named(part, keys(one))
        page += section(f"{name}, of a planner", said[name], named(name, rows), 3)
    for name in sorted(PLANNERS):
        page += section(name, "", named("algorithm", keys(recipe(name))), 3)
    return page


def page() -> str:
    return (HEAD + of_images() + of_planners()).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    if parser.parse_args().check:
        is_current = PAGE.read_text(encoding="utf-8") == page()
        print(f"{PAGE.name}: {'current' if is_current else 'is another'}")
        return not is_current
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
