"""The native kernels: loaded on first use, so that the package imports without them."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from flowkern import torch_private as private
from flowkern.schedules import Coefficients

from . import native_cuda, outputs, sources

_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool,
)  # fmt: skip
_CPU, _CUDA = 1, 2  # the device types of DLPack
_CSRC = Path(__file__).resolve().parents[3] / "csrc"  # of a checkout


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from flowkern import _cpu
    except ImportError as error:
        return None, (
            f"the native kernels are not built ({error}); install with a C++ compiler present, "
            "FLOWKERN_BUILD=cpu shows why a build fails"
        )
    if reason := _is_of_other_sources(_cpu):
        return None, reason
    connect(_cpu, private.exchange)
    return _cpu, None


def _is_of_other_sources(module: ModuleType) -> str | None:
    """Why not, where a checkout has other sources than its build: it takes other arguments."""
    name = module.__name__.rpartition(".")[2]
    if not _CSRC.is_dir() or getattr(module, "sources", None) == sources.digest(name, _CSRC):
        return None
    reason = (
        f"{module.__file__} was built from other sources than those in {_CSRC}; "
        "python setup.py build_ext --inplace builds it again"
    )
    warnings.warn(f"flowkern: the native kernels do not serve: {reason}", stacklevel=2)
    return reason


def connect(module: ModuleType, exchange_api: object, served: int = _CPU, **others) -> None:
    """What kernels need of torch, and which tensors they take, by the device type of DLPack.

    Without DLPack's C exchange API they read attributes. others: in place of the usual, for tests.
    """
    names = {
        "tensor": Tensor,
        "parameter": torch.nn.Parameter,
        "coefficients": Coefficients,
        "empty": torch.empty,
        "is_neg": Tensor.is_neg,
        "dtypes": _DTYPES,
        "get_num_threads": torch.get_num_threads,
        "stream": private.raw_stream,
        "scratch": native_cuda.scratch,
        "siblings": native_cuda.siblings,
        "loss_outputs": outputs.loss_outputs,
        "served": served,
        "exchange": exchange_api,
    }
    module.connect(names | others)


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    try:
        from flowkern import _cuda
    except ImportError as error:
        return None, (
            f"the native CUDA kernels are not built ({error}); install with nvcc present, "
            "FLOWKERN_BUILD=cuda shows why a build fails"
        )
    if reason := _is_of_other_sources(_cuda):
        return None, reason
    connect(_cuda, private.exchange, _CUDA)
    return _cuda, None


def why_not() -> str | None:
    return _load()[1]


def cpu() -> ModuleType:
    return _load()[0]


def cuda() -> ModuleType:
    return _load_cuda()[0]


def of(x: Tensor) -> ModuleType:
    """The kernels for the device of `x`."""
    return cuda() if x.is_cuda else cpu()


@functools.cache
def cuda_why_not(device: torch.device) -> str | None:
    """Looks once per device: the kernels are loaded onto it, outside of any graph capture."""
    module, reason = _load_cuda()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    return module.why_not(index) or None
