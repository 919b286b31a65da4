"""The arguments of a function as a JSON schema and as a check: of type hints and docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from flowkern.agent.tools.output import ToolFailure, one_line
from flowkern.checks import shown

__all__ = ["Signature", "checked_by_schema", "described", "signature"]

Check = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Signature:
    """What a function tells a planner of itself."""

    description: str
    schema: dict[str, Any]
    check: Check
    """Arguments as they came -> as the function takes them; raises ToolFailure."""


def signature(function: Callable, name: str) -> Signature:
    """Of a function, or an object's bound method.

    Raises ValueError for an argument without a type hint, for *args and **kwargs, for a hint that
    has no JSON form, and for a function without a docstring.
    """
    import pydantic

    summary, notes = described(inspect.getdoc(function) or "")
    if not summary:
        raise ValueError(f"tool {name}: has no docstring; its first part is what a planner reads")
    fields = {}
    hints = get_type_hints(function, include_extras=True)
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"tool {name}: argument {parameter} has no name of its own")
        if key not in hints:
            raise ValueError(f"tool {name}: argument {key} has no type hint")
        note = pydantic.Field(description=notes.get(key))
        default = ... if parameter.default is parameter.empty else parameter.default
        # Under a name of ours: pydantic keeps some to itself, `schema` and `_x` among them.
        fields[f"argument_{len(fields)}"] = (Annotated[hints[key], note], (key, default))
    try:
        model = pydantic.create_model(
            name,
            __config__=pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=False),
            **{
                field: (hint, pydantic.Field(default, alias=key))
                for field, (hint, (key, default)) in fields.items()
            },
        )
        schema = _plain(model.model_json_schema())
    except pydantic.errors.PydanticUserError as error:
        raise ValueError(f"tool {name}: {one_line(error.message)}") from error
    names = {field: key for field, (_, (key, _)) in fields.items()}

    def check(arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = model.model_validate(dict(arguments))
        except pydantic.ValidationError as error:
            errors = error.errors(include_url=False)
            raise ToolFailure(_sentence(errors, list(names.values()))) from error
        return {key: getattr(found, field) for field, key in names.items()}

    return Signature(summary, schema, check)


def _sentence(errors: list[dict[str, Any]], known: list[str]) -> str:
    said = []
    for error in errors[:3]:
        where = ".".join(map(str, error["loc"]))
        if error["type"] == "missing":
            said.append(f"argument {where} is missing")
        elif error["type"] == "extra_forbidden":
            said.append(f"argument {where} is unknown, known are {', '.join(known) or 'none'}")
        else:
            wanted = (
                error["msg"].replace("Input should be", "expected").replace("Value error, ", "")
            )
            said.append(f"argument {where}: {wanted}, got {shown(error['input'])}")
    return one_line("; ".join(said))


def _plain(schema: Any) -> Any:
    """Without the titles that repeat the names."""
    if isinstance(schema, dict):
        kept = {k: v for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
        kept.setdefault("properties", {}) if kept.get("type") == "object" else None
        return {key: _plain(value) for key, value in kept.items()}
    return [_plain(value) for value in schema] if isinstance(schema, list) else schema


SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):?\s*$")
ARGUMENT = re.compile(r"^(\s+)(\w+)\s*(?:\([^)]*\))?\s*:\s*(.+)$")


def described(docstring: str) -> tuple[str, dict[str, str]]:
    """The part of a docstring before its sections on one line, and what "Args:" says of each."""
    summary: list[str] = []
    notes: dict[str, str] = {}
    section, indent, last = "", None, ""
    for line in docstring.splitlines():
        if found := SECTION.match(line):
            section = found[1]
        elif not section:
            summary.append(line)
        elif section in ("Args", "Arguments", "Parameters"):
            found = ARGUMENT.match(line)
            if found and (indent is None or found[1] == indent):
                indent, last = found[1], found[2]
                notes[last] = found[3].strip()
            elif last and line.strip():
                notes[last] += f" {line.strip()}"
    return " ".join(" ".join(summary).split()), notes


TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": (list, tuple),
    "object": dict,
    "null": type(None),
}


def checked_by_schema(schema: Mapping[str, Any]) -> Check:
    """The check of a tool from elsewhere, of which there is only the schema: names and plain types.

    What it lets pass, the tool itself may still refuse.
    """
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    open_ended = schema.get("additionalProperties", True) is not False and not properties

    def check(arguments: Mapping[str, Any]) -> dict[str, Any]:
        for key in required:
            if key not in arguments:
                raise ToolFailure(f"argument {key} is missing")
        for key, value in arguments.items():
            if key not in properties and not open_ended:
                known = ", ".join(properties) or "none"
                raise ToolFailure(f"argument {key} is unknown, known are {known}")
            wanted = properties.get(key, {}).get("type")
            types = [wanted] if isinstance(wanted, str) else list(wanted or ())
            if types and not any(_is_of(value, one) for one in types):
                raise ToolFailure(
                    f"argument {key}: expected {' or '.join(types)}, got {shown(value)}"
                )
        return dict(arguments)

    return check


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind in ("integer", "number"):
        return False
    return kind not in TYPES or isinstance(value, TYPES[kind])
