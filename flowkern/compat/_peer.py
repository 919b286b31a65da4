"""The project that a drop-in stands in for: imported when its class is asked for, never before."""

from __future__ import annotations

import importlib
from types import ModuleType


def imported(module: str, project: str) -> ModuleType:
    """The peer's module, or one line that says what is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise ImportError(f"{module}: {project} cannot be imported, {missing}") from None


def attribute(of: ModuleType | type, name: str, project: str):
    """What the peer's module, or class, calls `name`, or one line that says that this version of it
    has none."""
    try:
        return getattr(of, name)
    except AttributeError:
        place = f"{of.__module__}.{of.__qualname__}" if isinstance(of, type) else of.__name__
        raise ImportError(f"{place}.{name}: this version of {project} has none") from None
