"""Prompts from templates, in jinja2's sandbox: what a tool or a model said is a value in them, and
never becomes a template itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateNotFound
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flowkern.checks import ConfigError

FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
FAULTS += (RecursionError, MemoryError)
FOLDER = Path(__file__).with_name("templates")


class Prompts:
    """The templates NAME.jinja of a folder of one's own, and for those that it lacks, the
    package's: planner, executor, verifier, generator.
    """

    def __init__(self, folder: str | Path | None = None, key: str = "agent.prompts") -> None:
        """key: where a configuration has the folder. Raises ConfigError where it is none."""
        self.key = key
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{key}: got {str(folder)!r}, expected a folder of NAME.jinja")
        self._environment = ImmutableSandboxedEnvironment(
            loader=FileSystemLoader([str(f) for f in (folder, FOLDER) if f is not None]),
            undefined=StrictUndefined,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
        )

    def render(self, name: str, **values: Any) -> str:
        """The text of template `name`. Raises ConfigError, of a line, for one that there is not, or
        that asks for what it is not given."""
        try:
            return self._environment.get_template(f"{name}.jinja").render(values)
        except TemplateNotFound as error:
            raise ConfigError(f"{self.key}: has no template {error.name}") from None
        except FAULTS as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{self.key}: {name}.jinja: {said}") from error
