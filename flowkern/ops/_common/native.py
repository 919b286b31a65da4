"""The native kernels: loaded on first use, so that the package imports without them."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from flowkern.schedules import Coefficients

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from flowkern import _cpu
    except ImportError as error:
        return None, (
            f"the native kernels are not built ({error}); install with a C++ compiler present, "
            "FLOWKERN_BUILD=cpu shows why a build fails"
        )
    connect(_cpu, getattr(Tensor, "__dlpack_c_exchange_api__", None))
    return _cpu, None


def connect(module: ModuleType, exchange_api: object) -> None:
    """What the CPU kernels need of torch; without DLPack's C exchange API they read attributes."""
    dtypes = (*_DTYPE_CODES, torch.float64, torch.int64, torch.bool)
    module.connect(
        Tensor, torch.nn.Parameter, Coefficients, torch.empty, torch.get_num_threads,
        torch.device("cpu"), dtypes, exchange_api,
    )  # fmt: skip


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    try:
        from flowkern import _cuda
    except ImportError as error:
        return None, (
            f"the native CUDA kernels are not built ({error}); install with nvcc present, "
            "FLOWKERN_BUILD=cuda shows why a build fails"
        )
    return _cuda, None


def why_not() -> str | None:
    return _load()[1]


def cpu() -> ModuleType:
    return _load()[0]


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


def cuda() -> ModuleType:
    return _load_cuda()[0]


def latent(x: Tensor | None) -> tuple[int, int, int] | None:
    """(address, elements from sample to sample, dtype code), as the kernels take a latent."""
    return None if x is None else (address(x), x.stride(0), _DTYPE_CODES[x.dtype])


def address(x: Tensor | None) -> int:
    if x is None:
        return 0
    found = x.data_ptr()
    if found < 65536 and x.numel():  # null, or an offset from it
        raise ValueError(
            f"expected tensors with memory, got one of shape {tuple(x.shape)} of freed storage, "
            "or none"
        )
    return found
