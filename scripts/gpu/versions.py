"""What the machine has, for whoever reads the results: python scripts/gpu/versions.py"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "setuptools", "pybind11", "pytest", "pytest-xdist")
PACKAGES += ("pytest-timeout", "hypothesis", "diffusers", "transformers", "accelerate", "peft")
PACKAGES += (
    "pydantic",
    "importlib_metadata",
    "lazy-importer",
    "huggingface_hub",
    "requests",
    "regex",
    "pillow",
)
COMMANDS = {
    "nvidia-smi": ["nvidia-smi"],
    "nvcc": ["nvcc", "--version"],
    "gcc": ["gcc", "--version"],
    "g++": ["g++", "--version"],
    "ncu": ["ncu", "--version"],
    "compute-sanitizer": ["compute-sanitizer", "--version"],
}


def main() -> int:
    here = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]).strip()
    print(f"commit {os.environ.get('FLOWKERN_COMMIT') or here}")
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, {platform.platform()}")
    for name in PACKAGES:
        print(f"{name} {_version(name)}")
    if tuple(map(int, _version("setuptools").split(".")[:1] or [0])) < (77,):
        print("setuptools is below 77: it cannot read pyproject.toml; carry a wheel")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    print(f"Python.h {header if header.exists() else 'missing: Triton cannot launch'}")
    libraries = _output(["ldconfig", "-p"])
    print(f"libcuda {'in ldconfig' if 'libcuda.so' in libraries else 'not in ldconfig'}")
    for name, command in COMMANDS.items():
        print(f"-- {name}: {shutil.which(name)}\n{_output(command)}".rstrip())

    import torch

    import flowkern

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}: {properties.multi_processor_count} multiprocessors, L2 "
              f"{properties.L2_cache_size / 2**20:.0f} MiB, {properties.total_memory / 2**30:.0f} "
              f"GiB, torch for CUDA {torch.version.cuda}")  # fmt: skip
        print(f"backends {flowkern.backends('cuda')}")
        print("arch %d%d" % torch.cuda.get_device_capability())  # noqa: UP031
        return 0
    print(f"backends {flowkern.backends('cpu')}\nno CUDA device")
    return 0 if os.environ.get("GPU_REHEARSE") == "1" else 1


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "0 (missing)"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=8).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}\n"


if __name__ == "__main__":
    sys.exit(main())
