"""Sigmas as callers give them, looked at: float64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern.checks import shown_in_a_line

NEAR_ONE = 1e-5  # a sigma as near to 1 counts as 1: rounded grids begin at .999999


def sigmas_of(name: str, value) -> Tensor:
    """Numbers in any form as a float64 tensor on the CPU."""
    try:
        plain = value.tolist() if hasattr(value, "tolist") else value
        entries = plain if isinstance(plain, Sequence) else [plain]
        if not any(isinstance(v, (bool, complex, str)) for v in entries):
            return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"{name}: expected numbers, got {shown_in_a_line(value)}")


def edge_of(name: str, value) -> Tensor:
    """Sigmas where an edge begins, or ends: a number or (S,), in the interval of that end."""
    value = sigmas_of(name, value)
    if value.ndim > 1:
        raise ValueError(f"{name}: expected a number or shape (S,), got {tuple(value.shape)}")
    if name == "sigma":
        value = torch.where((value - 1).abs() <= NEAR_ONE, 1.0, value)
    inside = (value > 0) & (value <= 1) if name == "sigma" else (value >= 0) & (value < 1)
    if not bool(inside.all()):  # NaN is not inside either
        interval = "(0, 1]" if name == "sigma" else "[0, 1)"
        raise ValueError(f"{name}: expected values in {interval}, got {value.tolist()}")
    return value
