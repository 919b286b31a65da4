"""torch.compile as a rival: compiled once, whole, for static shapes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from device_time import IS_REHEARSAL

# A pool of compilers is for many kernels; these are few, and its start costs seconds.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def compiled(function: Callable, *arguments, fallback_random: bool = False) -> Callable[[], tuple]:
    """`function` of fixed arguments, compiled at the first call (outside the timing). In a
    rehearsal without code of its own: what a CPU needs of it takes half a minute.
    """
    how = {"options": {"fallback_random": fallback_random}}
    if IS_REHEARSAL:
        how = {"backend": "aot_eager"}

    @functools.cache
    def code():
        return torch.compile(function, fullgraph=True, dynamic=False, **how)

    return lambda: code()(*arguments)
