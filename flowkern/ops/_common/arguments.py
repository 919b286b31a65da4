"""Checks shared by the ops: every error names the argument, what came and what was wanted."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from flowkern.schedules import Coefficients

from .dispatch import is_tracing

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRIDED = torch.strided
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAX_STEP = 2**28
STREAMS = {"init": 0, "step": 1, "match": 2}


def check_latent(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """A floating-point (B, *D) tensor; with `like`, of its shape and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout is not STRIDED:
        raise TypeError(f"{name}: expected a dense tensor, got the layout {x.layout}")
    if like is None:
        if x.ndim < 2:
            raise ValueError(
                f"{name}: expected shape (B, *D) with at least two dimensions, got {tuple(x.shape)}"
            )
        return
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {x.device}")


def check_latents(named: Mapping[str, Tensor]) -> torch.dtype:
    """Latents of the first one's shape and device; returns the dtype of the arithmetic.

    That is float64 where any of them is, else float32. In one frame, as every call of an op comes
    through here; `check_latent` says what is wrong.
    """
    first, dtype = None, torch.float32
    for name, x in named.items():
        if first is None:
            check_latent(name, x)
            first, shape, device = x, x.shape, x.device
        elif not isinstance(x, Tensor) or x.dtype not in FLOATS or x.layout is not STRIDED:
            check_latent(name, x)
        elif x.shape != shape or x.device != device:
            check_latent(name, x, first)
        if x.dtype is torch.float64:
            dtype = torch.float64
    return dtype


def check_per_sample(name: str, x: Tensor, batch: int, device: torch.device) -> None:
    """A floating-point (B,) tensor on `device`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_index(name: str, index: Tensor, count: int, device: torch.device) -> Tensor:
    """(B,) integers in [0, count), as int64.

    Values are looked at on the CPU; on CUDA only with FLOWKERN_DEBUG=1, as that synchronizes.
    """
    if not isinstance(index, Tensor) or index.dtype not in INTEGERS or index.ndim != 1:
        raise TypeError(f"{name}: expected an integer tensor of shape (B,), got {_describe(index)}")
    if index.device != device:
        raise ValueError(f"{name}: expected device {device}, got {index.device}")
    if count == 0 and len(index):
        raise IndexError(f"{name}: expected no values where there are no rows, got {len(index)}")
    _check_range(name, index, count)
    return packed(index, torch.int64)


def check_fraction(name: str, x: Tensor) -> None:
    """Values in [0, 1], looked at where `check_index` looks."""
    if _is_readable(x):
        low, high = (float(bound) for bound in x.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name}: expected values in [0, 1], got {low} to {high}")


def _is_readable(x: Tensor) -> bool:
    """Whether its values can be looked at, at no cost of a synchronization."""
    on_host = x.device.type == "cpu" or os.environ.get("FLOWKERN_DEBUG") == "1"
    return on_host and x.numel() > 0 and not is_tracing(x)


def _check_range(name: str, index: Tensor, count: int) -> None:
    if _is_readable(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= count:
            raise IndexError(f"{name}: expected values in [0, {count}), got {low} to {high}")


def is_number(value) -> bool:
    """A real number of Python or numpy."""
    if type(value) is float or type(value) is int:  # abstract classes are slow to ask
        return True
    return isinstance(value, Real) and not isinstance(value, bool)


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64 (the reference only), else float32."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def check_edges(
    name: str, edges: Coefficients, batch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The table of `edges` in `dtype`: (batch, columns), or (columns,) for one edge for all."""
    if not isinstance(edges, Coefficients):
        raise TypeError(
            f"{name}: expected flowkern.schedules.Coefficients, got {type(edges).__name__}"
        )
    table = edges.table
    if table.ndim == 2 and table.shape[0] != batch:
        raise ValueError(
            f"{name}: expected a single edge or {batch}, one per sample; got {table.shape[0]}"
        )
    if table.device != device:
        raise ValueError(
            f"{name}: expected device {device}, got {table.device}; "
            f"move it once with c.to({str(device)!r})"
        )
    return table if table.dtype == dtype else edges.to(device, dtype).table


def per_sample_contiguous(x: Tensor) -> Tensor:
    """`x` where each sample is contiguous (whatever lies between samples), else a copy."""
    x = x.resolve_neg()
    if x.is_contiguous() or x.shape[0] == 0 or x[0].is_contiguous():
        return x
    return x.contiguous()


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `x`, without gradient, one after the other in memory of `dtype`."""
    if not torch.compiler.is_compiling():  # which cannot trace is_neg
        if x.dtype is dtype and x.is_contiguous() and not (x.requires_grad or x.is_neg()):
            return x
    return x.detach().to(dtype).contiguous().resolve_neg()  # a view may hold the other sign


def check_guidance(velocity_uncond: Tensor | None, guidance_scale: float, velocity: Tensor) -> None:
    if not (is_number(guidance_scale) and math.isfinite(guidance_scale)):
        raise ValueError(f"guidance_scale: expected a finite number, got {guidance_scale!r}")
    if velocity_uncond is not None:
        check_latent("velocity_uncond", velocity_uncond, velocity)
    elif guidance_scale != 1.0:
        raise ValueError(f"velocity_uncond: needed for guidance_scale={guidance_scale}, got None")


def check_out(out: Tensor, latents: Mapping[str, Tensor], others: Mapping[str, object]) -> None:
    """`out` is written while inputs are read: apart from all of them, or x_t, velocity or noise,
    element for element. others: what else is read, tensors among them.
    """
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    if out.requires_grad:
        raise ValueError("out: expected a tensor that requires no gradient")
    if is_tracing(out):
        return  # traced tensors have no addresses
    if out.is_neg():
        raise ValueError("out: expected memory to write, got a negated view")
    begin = out.data_ptr()
    end = begin + out.nbytes
    in_place = {latents[n].data_ptr() for n in ("x_t", "velocity", "noise") if n in latents}
    for name, x in {**latents, **others}.items():
        x = x.table if isinstance(x, Coefficients) else x
        if not isinstance(x, Tensor) or x.numel() == 0:
            continue
        first, span = x.data_ptr(), x.nbytes
        if not x.is_contiguous():
            steps = zip(x.shape, x.stride(), strict=True)
            span = (sum((n - 1) * stride for n, stride in steps) + 1) * x.element_size()
        is_same = first == begin and x.dtype == out.dtype and x.is_contiguous()
        is_same &= begin in in_place and name in latents
        if first < end and begin < first + span and not is_same:
            raise ValueError(
                f"out: overlaps {name}; expected memory of its own, or exactly that of x_t, "
                "velocity or noise"
            )


class Noise(NamedTuple):
    """Where noise comes from: `given`, or Philox with (seed, sample_id, step), or nowhere."""

    given: Tensor | None = None
    seed: int = 0
    sample_id: Tensor | None = None  # (B,) int64
    step: Tensor | None = None  # (B,) int64, or None: step_value for all
    step_value: int = 0

    @classmethod
    def of(cls, given, seed: int | None, sample_id, step: int | Tensor | None) -> Noise:
        """From what a loss's inputs hold: all None where there is none."""
        if isinstance(step, Tensor):
            return cls(given, seed, sample_id, step)
        return cls(given, seed or 0, sample_id, None, step or 0)


def check_noise(noise, seed, sample_id, step, like: Tensor) -> Noise:
    """Either `noise`, or all of `seed`, `sample_id` and `step`."""
    if noise is None:
        if seed is None or sample_id is None or step is None:
            name = "seed" if seed is None else "sample_id" if sample_id is None else "step"
            raise ValueError(
                f"{name}: got None; expected noise, or all of seed, sample_id and step "
                "(a sample's noise follows from them alone, so ids and steps must not repeat)"
            )
        return check_key(seed, sample_id, step, like.shape[0], like.device)
    keyed = {"seed": seed, "sample_id": sample_id, "step": step}
    extra = [name for name, value in keyed.items() if value is not None]
    if extra:
        raise ValueError(
            f"noise: given together with {extra}; expected noise, or seed with sample_id and step"
        )
    check_latent("noise", noise, like)
    return Noise(given=noise)


def check_key(seed: int, sample_id, step, batch: int, device: torch.device) -> Noise:
    """A Philox key: 64 bits of seed, sample_id (B,) integers, step an int or (B,) integers."""
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected an integer, got {seed!r}") from None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")
    seed = seed - 2**64 if seed >= 2**63 else seed  # the same bits as an int64, for op schemas
    sample_id = _ids("sample_id", sample_id, batch, device)
    if type(step) is int or isinstance(step, Integral):
        if not 0 <= step < MAX_STEP:
            raise ValueError(f"step: expected 0 <= step < 2**28, got {step}")
        return Noise(None, seed, sample_id, None, int(step))
    step = _ids("step", step, batch, device)
    _check_range("step", step, MAX_STEP)
    return Noise(None, seed, sample_id, step)


def _ids(name: str, value, batch: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = torch.tensor(value, dtype=None if value else torch.int64, device=device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor of shape ({batch},), got {value!r}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if value.shape != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return packed(value, torch.int64)
