"""Calls of the native kernels, of the CPU or of a CUDA device (csrc/verbs.h).

A kernel reads its arguments itself, in one crossing from Python: what a call costs before its data
is touched, it costs in Python, above all where the caches are cold. What it does not take as it is
it leaves alone, and returns None. So a verb has a straight way, `direct`, and a way that checks,
explains, converts and ends in `run`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flowkern import torch_private as private

from . import native
from .arguments import Noise, packed, per_sample_contiguous
from .dispatch import straight_on_cuda


def direct(backend: str | None, like: Tensor) -> ModuleType | None:
    """The kernels for the device of `like`, for arguments that nobody has looked at: where they are
    the backend asked for, and no compiler, mode or transform must see more than they do.
    """
    if backend is not None and backend != "native":
        return None
    if is_dynamo_compiling() or private.num_modes():
        return None
    if private.is_in_func() or private.forward_level() >= 0:  # is_transformed(), without its frame
        return None
    if getattr(like, "is_cuda", False):
        return straight_on_cuda(like.get_device())
    return native._load()[0]  # cpu(): each frame that is spared is half a microsecond, cold


def run(name: str, *arguments):
    """A kernel's result for checked arguments; what it cannot take as it is, it gets copied.

    All tensors are on one device, which the first argument has.
    """
    kernel = getattr(native.of(arguments[0]), name)
    result = kernel(*arguments, False)
    if result is None:
        result = kernel(*map(_plain, arguments), True)  # True: what is still wrong is an error
    return result


def _plain(x):
    """A tensor, or each of a list, as kernels read it: neither a subclass nor a negated view, each
    sample contiguous.
    """
    if isinstance(x, list):
        return [_plain(one) for one in x]
    if not isinstance(x, Tensor):
        return x
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        x = x.as_subclass(Tensor)
    return per_sample_contiguous(x) if x.ndim > 1 else packed(x, x.dtype)


def noise(source: Noise | None) -> tuple:
    """(noise, seed, sample_id, step) as kernels take them."""
    if source is None or (source.given is None and source.sample_id is None):
        return None, None, None, None
    if source.given is not None:
        return source.given, None, None, None
    step = source.step_value if source.step is None else source.step
    return None, source.seed, source.sample_id, step
