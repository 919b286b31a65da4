"""Object files for tests, each compiled once: kept in build/tests for whoever wants the same, at
once or later.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "tests"
INCLUDES = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
FOR_PYTHON = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-w", *INCLUDES]
HERE = Path(__file__).parent
ON_CPU = ["-include", HERE / "cuda_on_cpu.h", "-x", "c++", "-O1", "-mf16c", "-mfma"]
ON_CPU += ["-ffp-contract=off", "-U_FORTIFY_SOURCE"]  # whose longjmp goes up one stack alone


def cuda_on_cpu(*runtime):
    """Objects of the module of the CUDA kernels with these as C++ for a CPU (cuda_on_cpu.h), and of
    what stands for the CUDA runtime instead of what runs them, if given.
    """
    sources = [*sorted(ROOT.glob("csrc/*/*_cuda.cu")), HERE / "cuda_on_cpu.cpp", *runtime]
    return compiled(sources, *FOR_PYTHON, *ON_CPU)


def compiled(sources, *command):
    """Of each source an object made by the command, and that of the module, whichever way kernels
    are built the same; two at a time.
    """
    module = ROOT / "csrc" / "cuda_module.cpp"
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_object, ROOT / source, command) for source in sources]
        jobs.append(pool.submit(_object, module, (*FOR_PYTHON, "-O1")))
        return [job.result() for job in jobs]


def _object(source, command):
    command = [*map(str, command), "-c", str(source.relative_to(ROOT)), "-o"]
    way = hashlib.sha256(repr(command).encode()).hexdigest()[:12]
    target = KEPT / f"{source.stem}-{way}-{_inputs(command[0])}.o"
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / f"{source.stem}-{way}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of the suite may be at it
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")
            done = subprocess.run([*command, part], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            for old in KEPT.glob(f"{source.stem}-{way}-*.o"):
                old.unlink()
            part.replace(target)  # whole, or not at all
    return target


@cache
def _inputs(compiler):
    """A hash of all that may be included, and of who compiles."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    found = hashlib.sha256(version + sys.version.encode() + pybind11.__version__.encode())
    files = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    ours = [p for p in HERE.rglob("*") if p.suffix in (".h", ".cpp")]
    for path in sorted([*files, *ours]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
