"""A sampler of one's own: a function of an edge's numbers, or where it is, as "module:function".

    def euler(sigma, sigma_next, noise_level):
        return 1.0, sigma_next - sigma, 0.0  # a, b, std

It is asked once for each edge of a grid, on the host, and what it gives is looked at; kernels and
everything after them know rows of coefficients alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from flowkern.checks import ConfigError, finite_number, shown, shown_in_a_line
from flowkern.lookup import load
from flowkern.schedules.coefficients import COLUMNS, Coefficients, checked, stacked
from flowkern.schedules.formulas import KINDS

Sampler: TypeAlias = Callable[[float, float, float], Sequence[float]]
"""(sigma, sigma_next, noise_level) -> (a, b, std), with the k and c of a Gaussian, or (a, b, std,
k, c)."""


def sampler_of(kind: str | Sampler, key: str = "kind", known: Sequence[str] = KINDS) -> Sampler:
    """The function that is, or is called, `kind`, which is none of the `known` names. Raises
    ValueError naming `key`.
    """
    if callable(kind):
        return kind
    try:
        found: Any = load(kind, dict.fromkeys(known, ""), key)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if not callable(found):
        raise ValueError(f"{key}: got {kind!r}, which is {shown(found)}, expected a function")
    return found


def own_edges(kind: str | Sampler, s: Tensor, n: Tensor, noise_level: float) -> Coefficients:
    """The edges of shape () or (S,), as that sampler has them."""
    sampler = sampler_of(kind)
    name = kind if isinstance(kind, str) else getattr(kind, "__qualname__", shown(kind))
    numbers = zip(s.flatten().tolist(), n.flatten().tolist(), strict=True)
    rows = [_row(sampler, name, *edge, noise_level) for edge in numbers]
    a, b, std = s.new_tensor([row[:3] for row in rows]).reshape(-1, 3).unbind(1)
    table = stacked(a, b, std, s.flatten())
    for place, row in enumerate(rows):
        if len(row) > 3:
            table[place, 3:5] = s.new_tensor(row[3:])
    return checked(table.reshape(*s.shape, len(COLUMNS)), name=f"kind: {name}")


def _row(sampler: Sampler, name: str, *edge: float) -> list[float]:
    call = f"kind: {name}({', '.join(f'{x:g}' for x in edge)})"
    try:
        row: Any = sampler(*edge)
        row = row.tolist() if hasattr(row, "tolist") else row
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{call} raised {said}") from error
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) not in (3, 5):
        raise ValueError(
            f"{call} gave {shown_in_a_line(row)}, expected (a, b, std) or (a, b, std, k, c)"
        )
    wanted = [("a finite number", lambda x: True), ("a finite number >= 0", lambda x: x >= 0)]
    return [
        finite_number(f"{call}: {column}", value, *wanted[column in ("std", "k")])
        for column, value in zip(("a", "b", "std", "k", "c"), row, strict=False)
    ]
