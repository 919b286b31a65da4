"""docs/metrics.md as patterns: which keys a run may write."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/metrics.md"
STANDS_FOR = {"SIGMA": r"[01]\.\d{3}", "NAME": r"[^/]+", "UNIT": "[a-z]+"}
STANDS_FOR |= {"KIND": ".+", "ENTRY": ".+"}


def lines() -> dict[str, re.Pattern]:
    """A pattern of whole keys by each name of the first column."""
    rows = re.findall(r"(?m)^\| (`.+?) \|", PAGE.read_text())
    names = [name for row in rows for name in re.findall("`(.+?)`", row)]
    assert len(names) == len({*names}) > 30
    found = {}
    for name in names:
        parts = re.split("([A-Z]+)", name)
        found[name] = re.compile("".join(STANDS_FOR.get(p) or re.escape(p) for p in parts))
    return found


def unknown(*records) -> set[str]:
    """Keys without a line."""
    patterns = lines().values()
    keys = {key for record in records for key in record}
    return {key for key in keys if not any(p.fullmatch(key) for p in patterns)}


def unused(keys) -> set[str]:
    """Lines without a key."""
    return {name for name, p in lines().items() if not any(map(p.fullmatch, keys))}
