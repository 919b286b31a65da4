"""All edges of a grid that a caller hands over at every step: made when it is first seen."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flowkern.checks import finite_number
from flowkern.schedules import Coefficients, step_coefficients

# sigmas -> {(version, key): what was made of them}
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_MOST = 1024  # of one grid: a level that is another at each call would be remembered for ever


def remembered(sigmas: Tensor, key: tuple, make: Callable[[], Any]) -> Any:
    """`make()`, once for these sigmas as they are now (edited in place they are others) and key."""
    if not isinstance(sigmas, Tensor):
        raise TypeError(f"sigmas: expected a tensor, got {type(sigmas).__name__}")
    known = _known.setdefault(sigmas, {})
    place = _version(sigmas), key
    found = known.get(place)
    if found is None:
        if len(known) >= _MOST:
            known.clear()
        with torch.inference_mode(False):  # what a rollout remembers also serves training
            found = known[place] = make()
    return found


def _version(sigmas: Tensor) -> int | tuple | None:
    """Another one after an edit. Tensors of inference mode count none: on the CPU their values are
    looked at; on a device, where that would wait for it, they are taken to stay.
    """
    if not sigmas.is_inference():
        return sigmas._version
    return tuple(sigmas.flatten().tolist()) if sigmas.device.type == "cpu" else None


@dataclass(frozen=True)
class Grid:
    """Edges of a grid (S + 1,), in float32 on a device; from float64."""

    sampler: Coefficients
    """S edges."""
    euler: Coefficients
    """The same ones without noise."""
    sigmas: list[float]
    """(S,), where edges begin, on the host: 1 where a grid begins within 1e-5 of it."""
    std: Tensor
    """(S,), what stands before the noise."""
    g: Tensor
    """(S,), std / sqrt(-dt): the diffusion coefficient."""
    sqrt_dt: Tensor
    """(S,), sqrt(-dt)."""

    def step(self, index: int | Tensor) -> int:
        """`index` as a number, where the grid has an edge of that number."""
        return step_of("index", index, len(self.sampler))


def step_of(name: str, index: int | Tensor, count: int) -> int:
    """A step of `count`, whose number may be a tensor: scripts that shuffle steps have it so."""
    try:
        number = operator.index(index)  # of a tensor on a device it waits for that, as theirs do
    except TypeError:
        got = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else index
        raise TypeError(f"{name}: expected one integer, got {got}") from None
    if not 0 <= number < count:
        raise ValueError(f"{name}: expected a step from 0 to {count - 1}, got {number}")
    return number


def level_of(value: float | Tensor) -> float:
    """A noise level, for all samples."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.reshape(())
    return finite_number("noise_level", value, "a finite number >= 0", lambda x: x >= 0)


def grid_of(
    sigmas: Tensor, device: torch.device, make: Callable[..., Coefficients], *arguments
) -> Grid:
    """The edges that `make(sigmas, *arguments)` makes, S of them, on `device`."""

    def made() -> Grid:
        on_host = sigmas.detach().cpu()  # waits for a device: once for a grid
        sampler, euler = make(on_host, *arguments), step_coefficients(on_host, "ode", 0.0)
        sqrt_dt = torch.sqrt(euler.sigma - on_host[1:].double())
        narrow = (t.to(device, torch.float32) for t in (sampler, euler))
        numbers = (sampler.std, sampler.std / sqrt_dt, sqrt_dt)
        return Grid(*narrow, euler.sigma.tolist(), *(t.to(device, torch.float32) for t in numbers))

    return remembered(sigmas, (make, arguments, device), made)


def per_sample(edges: Coefficients, index: Tensor) -> Coefficients:
    """Of steps (B,), B edges; of one (1,), the edge that all samples share."""
    return edges[index] if len(index) != 1 else Coefficients(edges.table[index][0])
