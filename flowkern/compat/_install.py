"""Names of another project's module replaced, wherever they have gone to."""

from __future__ import annotations

import sys
from typing import Any

from ._peer import attribute, imported


def replace(module: str, project: str, names: dict[str, Any]) -> None:
    """Put `names` into a module, and into loaded modules that have imported its own by name.

    A second time is like once. One that is not installed, or lacks a name, is refused before
    anything changes.
    """
    found = imported(module, project)
    theirs = {name: attribute(found, name, project) for name in names}
    for place in list(sys.modules.values()):
        for name, ours in names.items():
            if getattr(place, "__dict__", {}).get(name) is theirs[name]:
                setattr(place, name, ours)
