"""A child process within a time and an output limit, both of which hold while it runs."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Outcome", "run_bounded"]


@dataclass(frozen=True)
class Outcome:
    output: bytes
    """Standard output and error as they came, at most one byte more than the limit."""
    status: int
    """As the process ended; of one that was killed, minus the signal."""
    ended: Literal["itself", "time", "flood"]
    session: int
    """Of the process and all that it started."""


def run_bounded(command: Sequence[str], given: bytes, seconds: float, limit: int) -> Outcome:
    """Run `command` with `given` as its standard input, no environment, no other file, in a session
    of its own, and end it after `seconds` or when it has written more than `limit` bytes."""
    with tempfile.TemporaryFile() as file:
        file.write(given)
        file.seek(0)
        process = subprocess.Popen(
            command,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            start_new_session=True,
        )
    try:
        output, ended = _read(process.stdout.fileno(), time.monotonic() + seconds, limit)
        if ended == "itself":  # it has closed its output, and may still run
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if process.returncode == -signal.SIGALRM:  # it kept the time itself
        ended = "time"
    return Outcome(output, process.returncode, ended, process.pid)


def _read(descriptor: int, deadline: float, limit: int) -> tuple[bytes, str]:
    pieces, length = [], 0
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while length <= limit:
        left = deadline - time.monotonic()
        if left <= 0:
            return b"".join(pieces), "time"
        # In short waits: a thread that is left behind ends between two of them.
        if not poll.poll(min(200.0, 1000 * left)):
            continue
        piece = os.read(descriptor, min(65_536, limit + 1 - length))
        if not piece:
            return b"".join(pieces), "itself"
        pieces.append(piece)
        length += len(piece)
    return b"".join(pieces), "flood"
