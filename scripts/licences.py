"""Writes docs/licences.md: the licence of every package that pyproject.toml names, as its metadata
says. --check: is the page current as to names?

    python scripts/licences.py [--check]

Each package must be installed where this runs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
NOT_IN_METADATA = {"torchao": "BSD-3-Clause"}  # of the licence file in its wheel
HEAD = """\
# Licences of dependencies

flowkern is under Apache-2.0 and has no code of others in it. What it needs is installed by pip,
under the licence that each package states in its own metadata; `python scripts/licences.py` wrote
this page from what is installed. What these packages need in turn, and the weights of models and
rewards, have licences of their own.

| package | wanted by | version | licence |
| --- | --- | --- | --- |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    missing = sorted(wanted().keys() - listed(PAGE.read_text())) if options.check else []
    if missing:
        print(f"docs/licences.md lacks {', '.join(missing)}: make it again", file=sys.stderr)
        return 1
    if not options.check:
        PAGE.write_text(page())
    return 0


def page() -> str:
    return HEAD + "".join(f"{row(name, by)}\n" for name, by in sorted(wanted().items()))


def listed(text: str) -> set[str]:
    return set(re.findall(r"(?m)^\| ([\w.-]+) \| ", text)) - {"package", "---"}


def wanted() -> dict[str, list[str]]:
    """Package -> what wants it: the package itself, a build of it, an extra."""
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = tree["project"]
    groups = {"flowkern": project["dependencies"], "a build": tree["build-system"]["requires"]}
    found: dict[str, list[str]] = {}
    for by, requirements in (groups | project["optional-dependencies"]).items():
        for requirement in requirements:
            name = re.match(r"[\w.-]+", requirement)[0].lower()
            found.setdefault(name, []).append(by)
    return found


def row(name: str, by: list[str]) -> str:
    try:
        told = metadata(name)
    except PackageNotFoundError:
        raise SystemExit(f"licences: {name} is not installed here") from None
    return f"| {name} | {', '.join(by)} | {told['Version'].partition('+')[0]} | {licence(told)} |"


def licence(told) -> str:
    """An SPDX expression, else the classifiers, else the first line of the free text."""
    if told["License-Expression"]:
        return told["License-Expression"]
    if told["Name"] in NOT_IN_METADATA:
        return f"{NOT_IN_METADATA[told['Name']]} (its licence file)"
    classifiers = told.get_all("Classifier") or []
    named = [text.split(" :: ")[-1] for text in classifiers if text.startswith("License ::")]
    named = [text for text in named if text != "OSI Approved"]
    free = (told["License"] or "").strip().partition("\n")[0]
    found = ", ".join(named) or free
    if not found or len(found) > 100:
        raise SystemExit(f"licences: the metadata of {told['Name']} names no licence")
    return found


if __name__ == "__main__":
    sys.exit(main())
