"""What went wrong, in one line; of several processes that find the same, one says it."""

from __future__ import annotations

import os
import sys
import time

PATIENCE = 10.0
"""Seconds in which the first process says it and is gone, which alone takes some: a launcher then
ends the others, and they say nothing."""


def said_of(error: BaseException) -> str:
    """In one line; of the operating system's errors the file, and what is wrong with it."""
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if isinstance(error, OSError) and name is not None and str(error).startswith("[Errno "):
        return f"{os.fspath(name)!r}: {error.strerror}"
    return " ".join(str(error).split())


def say(message: str) -> None:
    """On standard error, after `PATIENCE` where this is not the first process: a fault that it
    alone has found is said, too."""
    rank, here, count = (_number(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if rank and count > 1:
        time.sleep(PATIENCE + here / 4)
        message = f"process {rank}: {message}"
    print(f"flowkern: {message}", file=sys.stderr, flush=True)


def _number(name: str) -> int:
    """Of a launcher's variable; 0 where there is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0
