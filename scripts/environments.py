"""Clean environments of any Python, for what is tested outside of this tree. By uv, which finds an
interpreter by its version or path, downloads one where it may, and links files of its cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
# The kernels' tests that need nothing else of the tree, and how: half a minute of one core. What
# traces and compiles takes as long again, and is torch's.
QUICK = ("-q", "-p", "no:cacheprovider", "-k", "not compil and not opcheck and not standard_normal")
CORE = [
    f"tests/ops/test_{name}.py"
    for name in (
        "sde_step", "policy_loss", "matching_loss", "token_loss", "noise", "guidance", "truth",
    )
]  # fmt: skip


def run(*command, cwd: Path = ROOT, check: bool = True, log: Path | None = None, **environment):
    """A command that knows nothing of this tree or of the environment around it; `log` takes what
    it says."""
    drop = ("PYTHONPATH", "VIRTUAL_ENV", "FLOWKERN_BUILD")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    with open(log, "w") if log else open(os.devnull) as file:
        said = {"stdout": file, "stderr": subprocess.STDOUT} if log else {}
        return subprocess.run(
            [*map(str, command)], cwd=cwd, env=kept | environment, check=check, **said
        )


def tools(*packages: str) -> Path:
    """The folder of the commands of `packages`, and of uv, in an environment that is kept."""
    folder = ROOT / "build" / "tools"
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    missing = [name for name in ("uv", *packages) if not (folder / "bin" / name).exists()]
    if missing:
        run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *missing)
    return folder / "bin"


def uv(*command, **options):
    """uv, from the PATH or PyPI."""
    return run(_uv(), *command, UV_NO_PROGRESS="1", **options)


def _uv() -> Path:
    return Path(shutil.which("uv") or tools() / "uv")


def interpreters(pythons: Sequence[str]) -> list[str]:
    """The path of each, by its version or path, before there is any work to lose. Exits with a
    line for each that is not there and that uv cannot download."""
    paths = []
    for python in pythons:
        find = [_uv(), "python", "find", "--no-project", python]
        found = subprocess.run(find, capture_output=True, text=True)
        if found.returncode and uv("python", "install", "--quiet", python, check=False).returncode:
            print(f"{python}: {found.stderr.partition(chr(10))[0]}", file=sys.stderr)
            continue
        found = subprocess.run(find, capture_output=True, text=True, check=True)
        paths.append(found.stdout.strip())
    if len(paths) < len(pythons):
        sys.exit("not all Pythons are there, and nothing was built; a path names one as well")
    return paths


def environment(folder: Path, python: str, *packages: str, constrained: bool = True) -> Path:
    """The Python of a fresh environment with `packages`; constrained: in the tested versions."""
    uv("venv", "--quiet", "--clear", "--python", python, folder)
    interpreter = folder / "bin" / "python"
    if packages:
        install(interpreter, *packages, constrained=constrained)
    return interpreter


def install(interpreter: Path, *packages, constrained: bool = True, **options):
    """Into the environment of `interpreter`."""
    bounds = ("--constraint", CONSTRAINTS) if constrained else ()
    uv("pip", "install", "--quiet", "--python", interpreter, *bounds, *packages, **options)


def tests_alone(place: Path) -> Path:
    """A folder with the kernels' tests and the fuzzer, and nothing else of the tree."""
    for part in ("tests/ops", "tests/fuzz"):
        ignored = shutil.ignore_patterns("__pycache__", "stub_driver")
        shutil.copytree(ROOT / part, place / part, ignore=ignored)
    shutil.copy(ROOT / "tests" / "conftest.py", place / "tests")
    marks = "gpu: needs a CUDA device", "long(seconds): takes so many of a processor"
    (place / "pytest.ini").write_text("\n    ".join(("[pytest]\nmarkers =", *marks)) + "\n")
    return place
