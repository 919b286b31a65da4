"""Names that become objects: "module:attribute" of this package or of one's own, lazily."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from flowkern.checks import ConfigError, shown


def locate(name: Any, known: Mapping[str, str], key: str = "name") -> tuple[str, str]:
    """Module and attribute of what `load` would import, without doing it.

    Raises ConfigError naming `key` for what is neither known nor "module:attribute".
    """
    if isinstance(name, str):
        module, colon, attribute = known.get(name, name).partition(":")
        if colon and all(map(str.isidentifier, [*module.split("."), attribute])):
            return module, attribute
    choices = ", ".join([*sorted(known), '"module:attribute"'])
    near = nearest(str(name), known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ConfigError(f"{key}: got {shown(name)}, expected one of {choices}{hint}")


def load(name: Any, known: Mapping[str, str], key: str = "name") -> Any:
    """What `name` stands for: a key of `known`, whose values are "module:attribute", or
    "module:attribute" of any module that Python finds, or the working directory holds.

    Raises ConfigError naming `key` for what there is not, and for a module of one's own that cannot
    be imported. What a module of `known` lacks raises ImportError.
    """
    module, attribute = locate(name, known, key)
    if name in known:
        return getattr(import_module(module), attribute)
    found = _own(name, module, key)
    if not hasattr(found, attribute):
        near = nearest(attribute, [name for name in vars(found) if not name.startswith("_")])
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"{key}: got {name!r}, but {module} has no {attribute!r}{hint}")
    return getattr(found, attribute)


def _own(name: str, module: str, key: str) -> Any:
    """A module that the user wrote: whatever it raises is said in a line."""
    here = os.getcwd()
    # `python -m` looks here, an installed command does not; it stays, for what is imported later.
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name} in {here} or where Python looks"
        else:
            reason = f"{module} imports {error.name}, which is not there"
        raise ConfigError(f"{key}: got {name!r}, but {reason}") from error
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{key}: got {name!r}, but importing {module} raised {said}") from error


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(path: Any) -> bool:
    """Is it the id of a model on the Hugging Face hub, OWNER/NAME: one that could be, and no
    directory here?"""
    return _HUB_ID.fullmatch(str(path)) is not None and not os.path.isdir(path)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names are imported when they are first asked for.

    homes: name -> the module that has it, or that it is. So `flowkern --help` costs no torch.
    """

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = import_module(homes[name])
        value = home if home.__name__ == f"{package}.{name}" else getattr(home, name)
        setattr(sys.modules[package], name, value)
        return value

    return attribute
