"""Which sources a build of the native kernels is of. setup.py runs this too, without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

OTHERS = {"_cpu": "cuda", "_cuda": "cpu"}
"""A module -> what the names of sources contain that are not its own."""


def of_module(name: str, csrc: Path) -> list[Path]:
    return sorted(
        path for path in csrc.rglob("*") if path.is_file() and OTHERS[name] not in path.name
    )


def digest(name: str, csrc: Path) -> str:
    """Of the module's sources, names and contents."""
    found = hashlib.sha256()
    for path in of_module(name, csrc):
        content = path.read_bytes()
        found.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]
