"""A CUDA driver that records launches and runs nothing, and tensors of the CPU that pass for its.

    driver = stub_driver.load(folder)           # builds libcuda.so.1 there, with gcc, and loads it
    with stub_driver.tensors_on_cuda(), stub_driver.triton_on(driver, folder):
        kernel[(8,)](x, BLOCK=1024)             # Triton compiles for sm_90 and launches
    driver.launches()                           # [Launch("kernel", (8, 1, 1), (128, 1, 1), ...)]

For machines without a driver: `why_not()` says where it cannot be used. A process that has loaded
it is to be left alone by tests that look for a driver: use a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
MOST = 2**16  # launches that are kept; others are counted


class Launch(NamedTuple):
    """name: as in the binary, so mangled where C++ made it. device: whose context was current."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    stream: int
    device: int


class Driver:
    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.stub_launch.restype = ctypes.c_char_p
        library.stub_capture.argtypes = [ctypes.c_void_p]

    @property
    def count(self) -> int:
        return self._library.stub_launch_count()

    def launches(self) -> list[Launch]:
        """Since the last `clear`."""
        found, numbers, stream = [], (ctypes.c_uint * 7)(), ctypes.c_size_t()
        for index in range(min(self.count, MOST)):
            name = self._library.stub_launch(index, numbers, ctypes.byref(stream))
            grid, block = tuple(numbers[:3]), tuple(numbers[3:6])
            found.append(Launch(name.decode(), grid, block, stream.value, numbers[6]))
        return found

    def clear(self) -> None:
        self._library.stub_clear()

    def capture(self, stream: int) -> None:
        """From now on this stream counts as one that is captured; 0: none."""
        self._library.stub_capture(stream)


def why_not() -> str | None:
    if shutil.which("gcc") is None:
        return "needs gcc"
    if torch.cuda.is_available():
        return "there is a driver"
    return None


def load(folder: Path) -> Driver:
    """Built into `folder`, and loaded for the whole process: whoever looks for libcuda.so.1 then
    finds it by its name.
    """
    path = Path(folder) / "libcuda.so.1"
    command = ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-Wl,-soname,libcuda.so.1", HERE / "libcuda.c", "-o", path, "-ldl"]
    subprocess.run(list(map(str, command)), check=True)
    return Driver(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))


def native_kernels(folder: Path):
    """flowkern._cuda from its sources, with g++, on the driver that `load` has put into `folder`;
    to be connected.
    """
    import builds

    folder = Path(folder)
    objects = builds.cuda_on_cpu(HERE / "runtime_on_stub.cpp")
    command = ["g++", "-shared", *objects, folder / "libcuda.so.1", "-o", folder / "_cuda.so"]
    subprocess.run(list(map(str, command)), check=True)
    spec = importlib.util.spec_from_file_location("_cuda", folder / "_cuda.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory_of_the_host(index, stream, floats, counts, is_captured):
    """In place of native_cuda.scratch."""
    return torch.empty(floats), torch.zeros(counts, dtype=torch.int32)


@contextlib.contextmanager
def native_on(module, stream: int = 0):
    """backend="native" means these kernels, on tensors of `tensors_on_cuda`."""
    from flowkern.ops._common import native, native_calls

    others = {"stream": lambda index: stream, "scratch": memory_of_the_host}
    native.connect(module, native.private.exchange, native._CPU, **others)
    before = native.cuda, native_calls.straight_on_cuda
    native.cuda = lambda: module
    native_calls.straight_on_cuda = lambda index: module
    try:
        yield
    finally:
        native.cuda, native_calls.straight_on_cuda = before
        module.forget()


@contextlib.contextmanager
def tensors_on_cuda(device: int = 0):
    """Every tensor says that it is on a CUDA device; `x.device` is still the CPU, so that memory
    can be had. The attributes are the class's, not properties: they cost what torch's own cost.
    """
    stand_ins = {"is_cuda": True, "is_cpu": False, "get_device": lambda self: device}
    for name, value in stand_ins.items():
        setattr(torch.Tensor, name, value)
    try:
        yield
    finally:
        for name in stand_ins:
            delattr(torch.Tensor, name)  # then they are torch._C.TensorBase's again


@contextlib.contextmanager
def triton_on(driver: Driver, folder: Path, stream: int = 0):
    """Triton's real way to a launch: its binder, its compiler for sm_90, its launcher in C."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver as active

    cuda = CudaDriver()
    cuda.get_current_device = lambda: 0
    cuda.get_current_stream = lambda device: stream
    cuda.set_current_device = lambda device: None
    cuda.get_device_capability = lambda device: (9, 0)
    before = active._active
    active.set_active(cuda)
    try:
        yield
    finally:
        active._active = before  # resetting would look for a device
        del os.environ["TRITON_LIBCUDA_PATH"]
