"""The wheels that a machine without a registry may lack: python scripts/gpu/wheels.py

Downloads them into build/wheels, which git ignores and `make gpu` unpacks where it runs: diffusers,
pydantic and what they need that is less common, setuptools for the license field of pyproject.toml,
and liger-kernel, a rival. For the Python named by --python and this machine's platform
(pydantic_core is compiled), at the versions of constraints.txt.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("diffusers", "importlib_metadata", "lazy-importer", "setuptools")
NAMES += ("pydantic", "pydantic_core", "annotated-types", "typing-inspection")
RIVALS = ("liger-kernel==0.8.5",)  # of the token loss; it needs torch and triton alone
# What these need and a machine with torch, transformers, accelerate and peft is taken to have.
PRESENT = {"filelock", "huggingface-hub", "numpy", "pillow", "regex", "requests", "safetensors"}
PRESENT |= {"typing-extensions", "zipp"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--to", type=Path, default=ROOT / "build/wheels")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    for old in options.to.glob("*.whl"):  # of each one version
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", options.python, "--dest", options.to]
    status = subprocess.run([*map(str, command), *wanted(), *RIVALS]).returncode
    for path in sorted(options.to.glob("*.whl")):
        print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return status


def wanted() -> list[str]:
    """Requirements, at the tested versions."""
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text()))
    return [f"{name}=={pins[name]}" for name in NAMES]


def unpack(wheels: Path, target: Path) -> list[Path]:
    """Wheels into `target`; the paths for PYTHONPATH: none where no wheel is."""
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            if not all((target / name).exists() for name in archive.namelist()):
                archive.extractall(target)
    return [target] if found else []


if __name__ == "__main__":
    sys.exit(main())
