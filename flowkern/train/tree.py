"""Configurations as mappings: YAML files, merged, and ``key.path=value``. What is wrong is said in
a line that names the file and its line, or the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flowkern.checks import ConfigError, shown

EXTENDS = "extends"
"""A file, or several, that a file is merged over."""

REPLACED = ("reward",)
"""Sections that a later file replaces as a whole: rewards of two files are not meant to add up."""


def read(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mappings of YAML files, with what they extend, merged from the first to the last; then
    ``key.path=value`` replaces what it names.
    """
    tree: dict[str, Any] = {}
    for path in paths:
        tree = merged(tree, _extended(Path(path)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (equals and all(key.split("."))):
            raise ConfigError(f"override: got {override!r}, expected key.path=value")
        _set(tree, key, parse(text, key))
    return tree


def _extended(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over those that it extends, which are named relative to it."""
    tree, place = read_file(path), path.resolve()
    found = tree.pop(EXTENDS, [])
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends: got {shown(found)}, expected a file or a list of them")
    if place in below:
        raise ConfigError(f"{path}: extends: it extends itself, through {below[-1].name}")
    base: dict[str, Any] = {}
    for name in names:
        if not (path.parent / name).is_file():
            raise ConfigError(
                f"{path}: extends: there is no {name!r} in {place.parent}{_own(name)}"
            )
        base = merged(base, _extended(path.parent / name, (*below, place)))
    return merged(base, tree)


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping of one YAML file, which extends none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path}: {reason}; expected a YAML file, as in configs/{_own(path)}"
        ) from None
    tree = parse(text, str(path), is_file=True)
    if not isinstance(tree, dict):
        got = "is empty" if tree is None else f"got {shown(tree)}"
        raise ConfigError(f"{path}: {got}, expected a mapping of keys")
    return tree


def _own(name: str | Path) -> str:
    """Where the package has a file of that name: a wheel in demo_data, a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    found = [root / name for root in (package / "demo_data", package.parent)]
    own = next((path for path in found if path.is_file()), None)
    return f"; the package's own is {own}" if own and not Path(name).is_absolute() else ""


def parse(text: str, name: str, is_file: bool = False) -> Any:
    """The value of a YAML text. name: of its file, or of the key that it is for."""
    import yaml

    got = "" if is_file else f"got {shown(text)}, "
    try:
        loader = yaml.SafeLoader(text)
        loader.yaml_implicit_resolvers = _resolvers(loader.yaml_implicit_resolvers)
        node = loader.get_single_node()
        for key, part in _walk(node, "", set()):
            if part.id == "mapping":
                _refuse_twice(part, key)
                _refuse_without_a_space(part, key)
            elif part.id == "scalar":
                _construct(loader, part, key)
        return None if node is None else loader.construct_document(node)
    except ConfigError as error:
        raise ConfigError(f"{name}{', ' if is_file else ': '}{error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f", line {mark.line + 1}" if is_file and mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{name}{place}: {got}not YAML: {reason}") from None
    except RecursionError:
        raise ConfigError(f"{name}: {got}nested too deeply for a configuration") from None


def _resolvers(known: dict[str, list[tuple[str, Any]]]) -> dict[str, list[tuple[str, Any]]]:
    """Those of YAML 1.1, which reads 1e-4 as text, and 1.2's floats."""
    more = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+\Z"))
    return {first: [*known.get(first, []), more] for first in {*known, *"+-.0123456789"}}


def _construct(loader: Any, scalar: Any, key: str) -> None:
    try:
        loader.construct_object(scalar)
    except (ValueError, OverflowError) as error:  # 5000 digits, February 30
        prefix = f"line {_line(scalar)}: {key}: " if key else ""
        raise ConfigError(f"{prefix}got {shown(scalar.value)}: {error}") from None


def merged(tree: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`tree` with what `more` says, mapping by mapping; neither is changed."""
    out = dict(tree)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict) and key not in REPLACED
        out[key] = merged(out[key], value) if both else value
    return out


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        # A copy: what an anchor repeats is one object.
        inner = tree.get(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(parents[: depth + 1])}: is a value, and has no {last!r}")
        tree[parent] = tree = dict(inner)
    tree[last] = value


def _walk(
    node: Any, key: str, seen: set[int], above: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Any]]:
    """(full key, node) of a YAML document, each node once, however anchors repeat it."""
    if node is None or (id(node) in seen and id(node) not in above):
        return
    if id(node) in above:
        raise ConfigError(f"line {_line(node)}: {key} holds itself")
    seen.add(id(node))
    yield key, node
    if node.id == "sequence":
        parts = [(f"{key}[{i}]", item) for i, item in enumerate(node.value)]
    elif node.id == "mapping":
        parts = [(_join(key, name), item) for name, item in node.value]
    else:
        return
    for inner, part in parts:
        yield from _walk(part, inner, seen, above | {id(node)})


def _join(key: str, name: Any) -> str:
    last = name.value if name.id == "scalar" else name.id
    return f"{key}.{last}" if key else last


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _refuse_without_a_space(mapping: Any, key: str) -> None:
    """{path:x} is a key of that name without a value to YAML, whose colon takes a space."""
    for name, value in mapping.value if mapping.flow_style else ():
        is_plain = name.id == "scalar" and name.style is None and ":" in name.value
        if is_plain and value.id == "scalar" and value.style is None and not value.value:
            first, _, rest = name.value.partition(":")
            raise ConfigError(
                f"line {_line(name)}: {_join(key, name)}: expected a space after the colon, "
                f"{first}: {rest}"
            )


def _refuse_twice(mapping: Any, key: str) -> None:
    """YAML itself would take the last."""
    seen: dict[tuple[str, str], int] = {}
    for name, _ in mapping.value:
        if name.id == "scalar":
            first = seen.setdefault((name.tag, name.value), id(name))
            if first != id(name):
                before = next(_line(n) for n, _ in mapping.value if id(n) == first)
                raise ConfigError(
                    f"line {_line(name)}: {_join(key, name)} is given twice, first in line {before}"
                )
