"""torch.compile as a rival: compiled once, whole, for static shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def compiled(function: Callable, *arguments, fallback_random: bool = False) -> Callable[[], tuple]:
    """`function` of fixed arguments, compiled at the first call (outside the timing)."""

    @functools.cache
    def code():
        return torch.compile(
            function, fullgraph=True, dynamic=False, options={"fallback_random": fallback_random}
        )

    return lambda: code()(*arguments)
