"""Numbers as callers give them, looked at: sigmas as float64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkern.checks import finite_number, shown, shown_in_a_line
from flowkern.schedules.formulas import at_most_one


def sigmas_of(name: str, value) -> Tensor:
    """Numbers in any form as a float64 tensor on the CPU."""
    for one in value if isinstance(value, list | tuple) else (value,):
        refuse_device(name, one)
    try:
        plain = value.tolist() if hasattr(value, "tolist") else value
        entries = plain if isinstance(plain, Sequence) else [plain]
        if not any(isinstance(v, (bool, complex, str)) for v in entries):
            return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"{name}: expected numbers, got {shown_in_a_line(value)}")


def refuse_device(name: str, value) -> None:
    """Reading the values of a tensor that lies elsewhere waits for its device: not unasked."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise ValueError(
            f"{name}: expected numbers, or a tensor on the CPU, got one on {value.device}; "
            "device_coefficients takes it there, .cpu() waits for the device"
        )


def edge_of(name: str, value) -> Tensor:
    """Sigmas where an edge begins, or ends: a number or (S,), in the interval of that end."""
    value = sigmas_of(name, value)
    if value.ndim > 1:
        raise ValueError(f"{name}: expected a number or shape (S,), got {tuple(value.shape)}")
    if name == "sigma":
        value = at_most_one(value)
    inside = (value > 0) & (value <= 1) if name == "sigma" else (value >= 0) & (value < 1)
    if not bool(inside.all()):  # NaN is not inside either
        interval = "(0, 1]" if name == "sigma" else "[0, 1)"
        raise ValueError(f"{name}: expected values in {interval}, got {shown(value.tolist())}")
    return value


def level_of(kind: str, value) -> float:
    """A noise level of `kind`."""
    refuse_device("noise_level", value)
    level = finite_number("noise_level", value, "a finite number >= 0", lambda x: x >= 0)
    if kind == "cps" and level > 2:
        raise ValueError(f"noise_level: cps takes an angle in [0, 2], got {level}")
    return level


def second_of(sigma_max) -> float | None:
    """What stands for sigma where that is 1."""
    if sigma_max is None:
        return None
    refuse_device("sigma_max", sigma_max)
    return finite_number("sigma_max", sigma_max, "a number in [0, 1)", lambda x: 0 <= x < 1)
