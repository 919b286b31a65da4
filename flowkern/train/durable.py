"""Files that a kill or a power cut leaves whole: the old content, or the new, and nothing between.

A reader of a .jsonl file takes what is a record and passes over the rest: people write into them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowkern.checks import ConfigError

PARTIAL, DELETED = ".partial", ".deleted"
"""Endings of what is not there yet, and of what is no longer there: never read, removed later."""


def sync(path: Path) -> None:
    """A file's bytes, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(place: Path, key: str) -> None:
    """Raise ConfigError, naming the key, where no file or folder of that name can be written, as
    far as that shows before the work; nothing is written.
    """
    there = next(path for path in (place, *place.absolute().parents) if os.path.lexists(path))
    if there != place and not there.is_dir():
        raise ConfigError(f"{key}: {str(there)!r} is no directory")
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        raise ConfigError(f"{key}: Permission denied: {str(there)!r}")


def replace(path: Path, content: bytes | str) -> None:
    """Write a whole file. Where it cannot be written (a full disk) nothing of it stays."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def set_aside(path: Path) -> Path:
    """Take a directory's name away in one step; returns where it now waits to be removed."""
    doomed = path.with_name(path.name + DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    return doomed


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """One JSON object, on the disk when this returns; a number that is not finite is null.

    Where it cannot be written (a full disk) the file stays as it was.
    """
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    line = (json.dumps(finite, allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file: its objects with a "step"; other lines are passed over."""
    if not path.is_file():
        return []
    records = (_record(line) for line in path.read_bytes().split(b"\n"))
    return [record for record in records if record is not None]


class Growing:
    """What is kept of the records of a .jsonl file that grows; each line is read once, so that a
    long run does not read more and more."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """keep: what is kept of a record; nothing of it, where that is empty."""
        self.path, self.keep = path, keep
        self._kept: list[dict[str, Any]] = []
        self._read = 0

    def records(self) -> list[dict[str, Any]]:
        """Those of whole lines."""
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:  # begun anew
                self._kept, self._read = [], 0
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                if kept := self.keep(_record(line) or {}):
                    self._kept.append(kept)
        return self._kept


def truncate_lines(path: Path, step: int) -> None:
    """Drop the records of steps after `step`, and a last line that was cut short; what else is
    there stays.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    lines, last = content.split(b"\n")[:-1], content.rpartition(b"\n")[2]
    if _record(last) is not None:
        lines.append(last)
    kept = [line for line in lines if (_record(line) or {"step": step})["step"] <= step]
    replace(path, b"".join(line + b"\n" for line in kept))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # also of bytes that are no text
        return None
    is_record = isinstance(found, dict) and type(found.get("step")) in (int, float)
    return found if is_record else None
