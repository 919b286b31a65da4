"""Names of another project's module replaced, wherever they have gone to."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def replace(place: str, project: str, names: dict[str, Any]) -> None:
    """Put `names` into a module, or into its class: place is "module" or "module:Class".

    Loaded modules that have imported the module's own by name get ours, too. A second time is like
    once. A place that is not installed, or has no such name, is refused before anything changes.
    """
    module, _, inside = place.partition(":")
    try:
        found = importlib.import_module(module)
        found = getattr(found, inside) if inside else found
        theirs = {name: getattr(found, name) for name in names}
    except ImportError as error:
        raise ImportError(f"install: {project} is not installed here ({error})") from error
    except AttributeError as error:
        raise ImportError(
            f"install: another version of {project} than this drop-in is for ({error})"
        ) from error
    for name, ours in names.items():
        setattr(found, name, ours)
        for other in [] if inside else list(sys.modules.values()):
            if getattr(other, "__dict__", {}).get(name) is theirs[name]:
                setattr(other, name, ours)
