"""The row kernels, best first, and the reference."""

from __future__ import annotations

from types import ModuleType

import torch

from flowkern import torch_private as private
from flowkern.ops._common.dispatch import (
    Impl,
    choose,
    native_cpu_why_not,
    no_objection,
    triton_why_not,
)

from . import native_impl, reference


def _native() -> ModuleType:
    return native_impl


def _triton() -> ModuleType:
    from . import triton_impl  # on first use: `import flowkern` leaves triton out

    return triton_impl


# What is called gives a module: row kernels, which chunks.py calls, or a loss by itself.
IMPLS = (
    Impl("native", _native, native_cpu_why_not),
    Impl("triton", _triton, triton_why_not),
    Impl("reference", lambda: reference, no_objection),
)


@private.as_constant
def best(device: torch.device, dtype: torch.dtype, backend: str | None, transformed: bool) -> str:
    """The name of the one that serves."""
    return choose(IMPLS, device, dtype, backend, transformed).name


def row_kernel(name: str) -> ModuleType:
    return next(impl.call() for impl in IMPLS if impl.name == name)
