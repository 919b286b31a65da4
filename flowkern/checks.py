"""Ranges that fields state themselves, and the error of a configuration that cannot be used."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, on one line."""


class Held(ABC):
    """What a field's value is held to, as its annotation says: ``Annotated[int, Range(1)]``."""

    @abstractmethod
    def check(self, name: str, value: Any) -> None:
        """Raise ValueError naming the field whose value is outside; None is inside."""


@dataclass(frozen=True)
class Range(Held):
    """Numbers that a field takes."""

    low: float
    high: float = math.inf
    above: bool = False
    """low itself is outside."""
    below: bool = False
    """high itself is outside."""
    most: float = math.inf
    """Beyond it is a slip of the pen, which would cost all memory or never end."""

    def refused(self, value: float) -> str | None:
        """What was wanted instead; None: nothing else."""
        if value > self.most:
            return f"at most {self.most}"
        is_high = value > self.low if self.above else value >= self.low
        if is_high and (value < self.high if self.below else value <= self.high):
            return None
        if self.high == math.inf:
            return f"{'above' if self.above else 'at least'} {self.low}"
        start = f"above {self.low}" if self.above else f"from {self.low}"
        return f"{start} to {'below ' if self.below else ''}{self.high}"

    def check(self, name: str, value: float | None) -> None:
        wanted = None if value is None else self.refused(value)
        if wanted is not None:
            raise ValueError(f"{name}: got {shown(value)}, expected a number {wanted}")


ABOVE_0 = Range(0, above=True)
AT_LEAST_0 = Range(0)
SHARE = Range(0, 1, above=True)
BELOW_1 = Range(0, 1, below=True)


def count(most: float, least: int = 1) -> Range:
    """Of things: not none, and not more than makes sense."""
    return Range(0, above=True, most=most) if least == 1 else Range(least, most=most)


def check_fields(owner: Any) -> None:
    """Raise ValueError naming the first field of a dataclass that is outside of its range.

    A class that sets another default keeps the range of the one it derives from.
    """
    for name, allowed in held(type(owner)).items():
        allowed.check(name, getattr(owner, name))


@lru_cache(maxsize=256)
def held(kind: type) -> dict[str, Held]:
    """What the fields of a dataclass are held to, its own or those that it derives from."""
    found = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            for name, hint in typing.get_type_hints(base, include_extras=True).items():
                for note in getattr(hint, "__metadata__", ()):
                    if isinstance(note, Held):
                        found[name] = note
    return found


class _Short(reprlib.Repr):
    """What a message has room for: a value may be large, deep, or hold itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100
        self.maxlist = self.maxdict = self.maxtuple = self.maxset = 6

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() <= 256:
            return repr(value)
        # Longer ones Python refuses to write.
        return f"an integer of {value.bit_length()} bits"


shown = _Short().repr
"""A value as messages show it: on one line, and short."""


def shown_in_a_line(value: Any) -> str:
    """Also of what writes itself over several lines, as tensors do."""
    return " ".join(shown(value).split())


def counted(count: float, noun: str) -> str:
    """``1 step``, ``2,000 steps``, ``2 processes``: so many, as messages say it."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,.0f} {noun if round(count) == 1 else plural}"


def is_integer(value: Any) -> bool:
    """An integer of Python or numpy; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def finite_number(name: str, value: Any, wanted: str, is_right: Callable[[Any], bool]) -> float:
    """A finite number of Python, numpy or torch for which `is_right` holds, as a float.

    Raises ValueError that names the argument and says what was `wanted`.
    """
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    try:
        if is_number and math.isfinite(number) and is_right(number):
            return float(number)
    except OverflowError:  # an integer past float64
        pass
    raise ValueError(f"{name}: expected {wanted}, got {shown_in_a_line(value)}")


def whole_number(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError, naming the argument, for what is no integer of at least so many."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name}: got {shown(value)}, expected a whole number from {least}")
