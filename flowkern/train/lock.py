"""One run at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

NAME = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems that keep none


class Lock:
    """The right to write an output_dir, until `release` or the end of the process, however it ends.

    The system holds the lock for the process; the file names it for people, and for hosts that see
    the file and not the lock.
    """

    def __init__(self, output_dir: Path) -> None:
        """Raises OSError naming host and process where another run holds it."""
        self.path = output_dir / NAME
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            owner = self._owner() or me
            is_here = owner["host"] == me["host"]
            if not (is_here and self._is_free(owner["pid"])):
                os.close(self._descriptor)
                way_out = "end it, or name another output_dir"
                if not is_here:
                    way_out = f"if that run is gone, remove {str(self.path)!r}"
                raise OSError(
                    f"output_dir: {str(output_dir)!r} is in use by process {owner['pid']} on "
                    f"{owner['host']}; {way_out}"
                )
            if self._is_current():
                break
            os.close(self._descriptor)  # its owner removed it in between
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(me).encode(), 0)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _is_current(self) -> bool:
        """Is what was opened still the file of that name?"""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _owner(self) -> dict[str, Any] | None:
        """Who wrote the file; None where nobody has yet."""
        try:
            owner = json.loads(os.pread(self._descriptor, 4096, 0))
            return {"host": str(owner["host"]), "pid": int(owner["pid"])}
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            return None

    def _is_free(self, pid: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _NO_LOCKS and not _is_alive(pid)
        return True


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def owner_of(output_dir: Path) -> str | None:
    """Who writes the directory now, as far as the file says: a host, or None for nobody. Of another
    host it is not known whether that process lives.
    """
    try:
        owner = json.loads((output_dir / NAME).read_bytes())
        host, pid = str(owner["host"]), int(owner["pid"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None
    is_here = host == socket.gethostname()
    return None if is_here and not (pid == os.getpid() or _is_alive(pid)) else host
