"""Choosing the implementation of an op: the best that can serve, or exactly the one named."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from flowkern import torch_private as private

from . import native


@dataclass(frozen=True, eq=False)
class Impl:
    """One implementation of an op; `why_not(device, dtype)` is None where it can serve."""

    name: str  # "native" | "triton" | "reference"
    call: Callable
    why_not: Callable[[torch.device, torch.dtype], str | None]


class BackendError(RuntimeError):
    """The backend asked for cannot serve these arguments."""


@functools.cache  # asked at every call; nothing that the answer rests on changes in a process
def choose(
    impls: Sequence[Impl],
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    transformed: bool = False,
) -> Impl:
    """The first of `impls` that can serve, or the one named `backend`. Native kernels come first:
    on an H100 they take the device about as long as Triton's, the host a sixth of it (docs/gpu.md).

    `dtype` is float64 where any input is, else float32; `transformed` is `is_transformed()`. Raises
    ValueError for an unknown name, BackendError with the reason where the named one, or every one,
    cannot serve.
    """

    def why_not(impl: Impl) -> str | None:
        if transformed and impl.name != "reference":
            return (
                "its kernels have no forward mode and cannot see into what torch.func wraps; "
                "use backend='reference'"
            )
        return impl.why_not(device, dtype)

    if backend is None:
        for impl in impls:
            if why_not(impl) is None and not (impl.name == "triton" and interpreting()):
                return impl
        reasons = {impl.name: why_not(impl) for impl in impls}
        raise BackendError(f"no backend can serve {dtype} on {device}: {reasons}")
    for impl in impls:
        if impl.name == backend:
            reason = why_not(impl)
            if reason is not None:
                raise BackendError(
                    f"backend={backend!r} cannot serve {dtype} on {device}: {reason}"
                )
            return impl
    raise ValueError(f"backend: expected one of {[i.name for i in impls]} or None, got {backend!r}")


@functools.cache
def straight_on_cuda(index: int) -> ModuleType | None:
    """The native CUDA kernels, where they serve that device."""
    reason = native_why_not(torch.device("cuda", index), torch.float32)
    return native.cuda() if reason is None else None


def backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Which backends can serve latents on `device`: None means usable, else the reason."""
    device = torch.device(device)
    checks = {"reference": no_objection, "triton": triton_why_not, "native": native_why_not}
    return {name: check(device, torch.float32) for name, check in checks.items()}


def no_objection(device: torch.device, dtype: torch.dtype) -> None:
    """The reference serves everything, in float64 too."""


def native_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"the native kernels are for the CPU and for CUDA devices, got {device.type}"
    if dtype == torch.float64:
        return "it computes in float32; float64 is served by the reference"
    return native.why_not() if device.type == "cpu" else native.cuda_why_not(device)


def native_cpu_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Of an op without a native kernel for CUDA devices."""
    if device.type == "cuda":
        return "it has no native kernel for CUDA devices, where Triton's serves"
    return native_why_not(device, dtype)


def triton_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it computes in float32; float64 is served by the reference"
    if not _triton_version():
        return "triton is not installed"
    if interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets on the CPU"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if device.type == "cuda" else f"needs a CUDA tensor, got {device.type}"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter: on the CPU, for tests, and only when named."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def is_tracing(*arguments: object) -> bool:
    """Whether a compiler or a dispatch mode must see the op itself, rather than what it calls."""
    if torch.compiler.is_compiling() or private.num_modes() > 0:
        return True
    for x in arguments:  # a loop: this is asked at every call, and a generator costs as much again
        if type(x) not in _PLAIN and isinstance(x, torch.Tensor):
            return True
    return False


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


def is_transformed() -> bool:
    """Whether forward mode or a torch.func transform is under way: kernels read memory alone, and
    would drop a tangent, or find none where a tensor stands for another. The reference serves.
    """
    return private.is_in_func() or private.forward_level() >= 0


def lazily(module: str, name: str) -> Callable:
    """A function of a module imported on its first call: `import flowkern` leaves triton out."""

    loaded = None

    def call(*args):
        nonlocal loaded
        if loaded is None:
            loaded = getattr(importlib.import_module(module), name)
        return loaded(*args)

    return call
