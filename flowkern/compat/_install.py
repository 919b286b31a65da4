"""Names of another project's module replaced, wherever they have gone to."""

from __future__ import annotations

import sys
from typing import Any

from ._peer import attribute, imported


def replace(module: str, project: str, names: dict[str, Any]) -> None:
    """Put `names` into a module, and into loaded modules that have imported its own, by that name
    or by another.

    A second time is like once. One that is not installed, or lacks a name, is refused before
    anything changes.
    """
    found = imported(module, project)
    theirs = [attribute(found, name, project) for name in names]  # kept, and so their ids
    ours = dict(zip(map(id, theirs), names.values(), strict=True))
    for place in list(sys.modules.values()):
        for name, value in list(getattr(place, "__dict__", {}).items()):
            if id(value) in ours:
                setattr(place, name, ours[id(value)])
