"""Part A: versions, build, the first call of every kernel, their tests, their times."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sysconfig

from steps import IS_REHEARSAL, PYTHON, ROOT, Running, Steps

TESTS = ("tests/ops", "tests/models/test_attention.py")


def run(steps: Steps) -> None:
    for name in ("smoke.jsonl", "smoke.log"):
        (steps.results / name).unlink(missing_ok=True)
    if not steps.run("env", 25, [PYTHON, "scripts/gpu/versions.py"]):
        return steps.skip("the rest", "no CUDA device, or no torch that sees it: env.log")
    is_there = (ROOT / f"flowkern/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    build = None if is_there else start_build(steps)
    if is_there:
        steps.skip("build", "the native kernels came along")
    device = "cpu" if IS_REHEARSAL else "cuda"
    smoke = [PYTHON, "scripts/gpu/smoke.py", "--device", device, "--backend"]
    if not IS_REHEARSAL:
        steps.run("smoke-triton", 60, [*smoke, "triton"])
    if build is None or steps.finish(build):
        steps.run("smoke-native", 40, [*smoke, "native"])
    steps.run("pytest", 150, tests(), good=(0, 5))  # 5: none is there to run, as in a rehearsal
    command = [PYTHON, "benchmarks/speed.py", "--device", device, "--kernels", "--no-compile"]
    command += ["--json", steps.results / "kernels.json", "--leave-out", ",".join(left_out(steps))]
    if IS_REHEARSAL:
        command += ["--seconds", "0.001", "--only", "forward, off"]
    steps.run("kernels", 120, command)


def start_build(steps: Steps) -> Running | None:
    """The native kernels, for this card alone, in the background."""
    if shutil.which("nvcc") is None and not IS_REHEARSAL:
        return steps.skip("build", "no nvcc: Triton alone")
    arch = re.search(r"(?m)^arch (\d+)", (steps.results / "env.log").read_text())
    env = {"FLOWKERN_BUILD": "cuda", "FLOWKERN_CUDA_ARCHS": arch[1] if arch else ""}
    if IS_REHEARSAL:  # what serves the CPU is there already
        env = {"FLOWKERN_BUILD": "none"}
    return steps.start("build", 100, [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"], env)


def tests() -> list[str]:
    """pytest on the device's tests, with the plugins that are there; most of it is compiling."""
    command = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu"]
    if importlib.util.find_spec("xdist") and not IS_REHEARSAL:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60", "--timeout-method", "thread"]
    return [*command, *(["tests/ops/test_gpu.py"] if IS_REHEARSAL else TESTS)]


def left_out(steps: Steps) -> list[str]:
    """The kernels that failed their first call, as op:backend."""
    path = steps.results / "smoke.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return sorted({f"{line['op']}:{line['backend']}" for line in lines if not line["ok"]})
