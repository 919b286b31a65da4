"""Runs the kernels' core tests on the versions that pyproject.toml allows: lowest, tested, newest.

    python scripts/versions.py [--python PYTHON] [--only TORCH[/TRITON] ...] [--wheel FILE]

Each pair of torch and triton has an environment of its own under build/versions, with one wheel of
this tree, which is built where none is given; UV_TORCH_BACKEND=cpu takes torch's small wheels. What
was found is printed as rows of the table in docs/install.md, and kept in build/versions/found.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from build_wheel import build, source_distribution
from environments import (
    CONSTRAINTS,
    CORE,
    QUICK,
    ROOT,
    environment,
    install,
    interpreters,
    run,
    tests_alone,
)

FOLDER = ROOT / "build" / "versions"
SECONDS = 1800  # of each run of tests
TRITON = ("tests/ops/test_triton.py", "tests/ops/test_triton_losses.py")
COLUMNS = ("python", "torch", "triton", "core", "interpreted")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="version or interpreter")
    parser.add_argument("--only", nargs="+", metavar="TORCH[/TRITON]", help="these, and no others")
    parser.add_argument("--wheel", type=Path, help="of that Python; without, it is built")
    options = parser.parse_args()
    (python,) = interpreters([options.python])
    pairs = [(*text.split("/"), "")[:2] for text in options.only or ()] or allowed()
    shutil.rmtree(FOLDER / "place", ignore_errors=True)
    place = tests_alone(FOLDER / "place")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = options.wheel or build(source_distribution(folder), python, folder)
    for torch, triton in pairs:
        row = found(python, torch, triton, wheel.resolve(), place)
        keep(row)
        print(as_row(row), flush=True)
    return 0


def allowed() -> list[tuple[str, str]]:
    """Pairs: lowest with lowest, the tested torch with what it brings, newest with newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [text for text in project["dependencies"] if text.startswith("torch")]
    (triton,) = project["optional-dependencies"]["triton"]
    lowest = [re.search(r">=([\d.]+)", text)[1] for text in (torch, triton)]
    upper = [text.partition(",")[2] for text in (torch, triton)]
    return [tuple(lowest), (pins()["torch"], ""), (upper[0], upper[1])]


def pins() -> dict[str, str]:
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text()))


def found(python: str, torch: str, triton: str, wheel: Path, place: Path) -> dict[str, str]:
    """One row: what is installed, and what came out of each kind of test."""
    name = re.sub(r"[^\w.]+", "-", f"{torch}_{triton or 'its'}")
    interpreter = environment(FOLDER / name, python)
    others = (f"{name}=={pins()[name]}" for name in ("numpy", "pytest", "hypothesis"))
    install(interpreter, requirement("torch", torch), *others, constrained=False)
    install(interpreter, "--no-deps", wheel)
    if triton:  # another than the one that torch asks for
        install(interpreter, "--no-deps", requirement("triton", triton), constrained=False)
    code = (
        "import platform, torch, importlib.metadata as m; "
        "names = {d.name.lower() for d in m.distributions()}; "
        "print(platform.python_version(), torch.__version__, "
        "m.version('triton') if 'triton' in names else '-')"
    )
    said = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    row = dict(zip(COLUMNS, said.stdout.split(), strict=False))
    tests = functools.partial(outcome, interpreter, place, name)
    row["core"] = tests("core", *CORE)
    if row["triton"] != "-":
        row["interpreted"] = tests("interpreted", *TRITON, TRITON_INTERPRET="1")
    return row


def requirement(name: str, version: str) -> str:
    return f"{name}{version}" if version[0] in "<>=~!" else f"{name}=={version}"


def outcome(interpreter: Path, place: Path, name: str, kind: str, *files: str, **options) -> str:
    """The last line of pytest; all that it said is in build/versions."""
    log = FOLDER / f"{name}-{kind}.log"
    limited = ("timeout", SECONDS, interpreter, "-m", "pytest", *QUICK, *files)
    run(*limited, check=False, log=log, cwd=place, OMP_NUM_THREADS="1", **options)
    *_, last = log.read_text().splitlines() or ["nothing was said"]
    return re.sub(r" in [\d.]+s.*|^=+ | =+$|, \d+ (warnings?|deselected)", "", last)


def keep(row: dict[str, str]) -> None:
    """With what earlier runs found of other versions."""
    path = FOLDER / "found.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    same = ("python", "torch", "triton")
    rows = [other for other in rows if any(other.get(k) != row.get(k) for k in same)]
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")


def as_row(row: dict[str, str]) -> str:
    return f"| {' | '.join(row.get(name, '-') for name in COLUMNS)} |"


if __name__ == "__main__":
    sys.exit(main())
