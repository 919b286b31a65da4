"""Writes constraints-cpu.lock: the versions of constraints.txt with the hashes of their files.

    python scripts/lock.py --index URL [--files DIRECTORY]

URL: a package index that answers in JSON (PEP 691), as `pip config get global.index-url` names it.
DIRECTORY: files to take instead of the index's: torch built for the CPU, as the lock does not hold
what a CUDA build brings with it. `pip install --require-hashes -r constraints-cpu.lock` then
installs these files or nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints-cpu.lock"
JSON = "application/vnd.pypi.simple.v1+json"
TRITON = "triton==3.9.0"  # without CUDA, torch asks for none


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", required=True, metavar="URL")
    parser.add_argument("--files", type=Path, metavar="DIRECTORY")
    options = parser.parse_args()
    pins = re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text() + TRITON)
    lines = [f"# Made by scripts/lock.py from constraints.txt and {TRITON}."]
    for name, version in sorted(pins, key=lambda pin: pin[0].lower()):
        hashes = {*local(options.files, name, version)}
        hashes = hashes or {*published(options.index, name, version)}
        if not hashes:
            print(f"{name}=={version}: no file found", file=sys.stderr)
            return 1
        lines.append(" \\\n    ".join([f"{name}=={version}", *sorted(hashes)]))
    LOCK.write_text("\n".join(lines) + "\n")
    return 0


def published(index: str, name: str, version: str) -> Iterator[str]:
    """The hashes of a version's files, wheels and sources, for every platform."""
    url = f"{index.rstrip('/')}/{normal(name)}/"
    request = urllib.request.Request(url, headers={"Accept": JSON})
    with urllib.request.urlopen(request, timeout=60) as answer:
        for file in json.load(answer)["files"]:
            if is_of(file["filename"], name, version):
                yield f"--hash=sha256:{file['hashes']['sha256']}"


def local(directory: Path | None, name: str, version: str) -> Iterator[str]:
    for path in sorted(directory.iterdir()) if directory else ():
        if is_of(path.name, name, version):
            yield f"--hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def is_of(filename: str, name: str, version: str) -> bool:
    """Whether a file is of this version; a local version, +cpu, is."""
    stem, _, rest = filename.removesuffix(".tar.gz").partition("-")
    if filename.endswith(".tar.gz"):  # a name with hyphens may be written with them there
        stem, _, rest = filename.removesuffix(".tar.gz").rpartition("-")
    return normal(stem) == normal(name) and re.split(r"[-+]", rest)[0] == version


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
