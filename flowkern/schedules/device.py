"""Edges of one step from tensors: on their device, where nothing is looked at or waited for."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from flowkern.schedules.coefficients import Coefficients, lasting, stacked
from flowkern.schedules.formulas import KINDS, TEMPERED, rest_of, step
from flowkern.schedules.sigmas import level_of, second_of
from flowkern.torch_private import is_in_func, num_modes


def device_coefficients(
    sigma: Tensor,
    sigma_next: Tensor,
    kind: str,
    noise_level: float | Tensor,
    sigma_max: float | Tensor | None = None,
) -> Coefficients:
    """`edge_coefficients` of tensors, on their device: for values that the host does not know.

    One launch on CUDA; no value is read on the host, and none is looked at: what that would refuse
    gives numbers without sense. It traces under torch.compile, and runs in a CUDA graph.

    sigma, sigma_next, noise_level, sigma_max: 0-dim, (1,) or (B,) floating-point tensors on one
        device, each of a size of its own; the last two may be numbers. kind: a name of `KINDS`.

    Returns one edge, which broadcasts, where all have one value, else B: the values of
    `edge_coefficients`, computed in float64 and rounded to float32. Without gradient.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"kind: expected one of {KINDS}, got {kind!r}; a sampler of one's own takes numbers: "
            "step_coefficients makes a grid's edges of it, which an index on the device selects"
        )
    if not isinstance(sigma, Tensor):
        raise TypeError(
            f"sigma: expected a tensor, got {type(sigma).__name__}; edge_coefficients takes numbers"
        )
    size = 1
    level = noise_level if isinstance(noise_level, Tensor) else level_of(kind, noise_level)
    second = sigma_max if isinstance(sigma_max, Tensor) else second_of(sigma_max)
    for name, x in zip(_NAMES, (sigma, sigma_next, level, second), strict=True):
        if isinstance(x, Tensor):
            size = _size(name, x, sigma.device, size)
        elif name == "sigma_next":
            raise TypeError(f"sigma_next: expected a tensor as sigma is, got {type(x).__name__}")
    make = _rows if _serves_torch(sigma) else _launch
    with lasting():
        return Coefficients._checked(make(kind, size, sigma, sigma_next, level, second), 0)


_NAMES = ("sigma", "sigma_next", "noise_level", "sigma_max")


def _size(name: str, x: Tensor, device: torch.device, size: int) -> int:
    """The number of edges, `size` until here; from what the host knows of x."""
    if not x.is_floating_point() or x.ndim > 1:
        got = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"{name}: expected one floating-point number or shape (B,), got {got}")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got {x.layout}")
    if x.device != device:
        raise ValueError(f"{name}: expected the device of sigma, {device}, got {x.device}")
    count = x.numel()
    if count == 1 or count == size:
        return size
    if size != 1:
        raise ValueError(f"{name}: expected shape (), (1,) or ({size},), got {tuple(x.shape)}")
    return count


def _rows(kind: str, size: int, *inputs: Tensor | float | None) -> Tensor:
    """The table by torch, in float64."""
    shape = () if size == 1 else (size,)
    s, n, level, second = (_wide(x) if isinstance(x, Tensor) else x for x in inputs)
    rest = rest_of(s)
    if s.shape != shape:
        rest = rest.expand(shape)
    n = n.expand(shape)  # an end that all samples share, with beginnings of their own
    s = 1 - rest
    return stacked(*step(kind, s, rest, n, level, second), s, kind in TEMPERED).float()


def _wide(x: Tensor) -> Tensor:
    x = x.detach().double()
    return x.reshape(()) if x.ndim and x.numel() == 1 else x


def _serves_torch(sigma: Tensor) -> bool:
    """Off CUDA, and where a compiler or a transform must see the arithmetic itself."""
    if torch.compiler.is_compiling() or not sigma.is_cuda or type(sigma) is not Tensor:
        return True
    return num_modes() > 0 or is_in_func() or not _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _launch(*arguments) -> Tensor:
    return importlib.import_module("flowkern.schedules.triton_impl").rows(*arguments)
