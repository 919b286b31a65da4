"""Part C: memory errors, what bounds the kernels, their tiles, the token loss, and torch.compile
with the time that is left.
"""

from __future__ import annotations

import shutil

from steps import IS_REHEARSAL, PYTHON, Steps

# Every tensor an allocation of its own, so that what leaves it shows.
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
METRICS = ("gpu__time_duration.sum", "dram__bytes.sum", "launch__registers_per_thread")
METRICS += ("dram__throughput.avg.pct_of_peak_sustained_elapsed",)
METRICS += ("sm__throughput.avg.pct_of_peak_sustained_elapsed",)
METRICS += ("sm__warps_active.avg.pct_of_peak_sustained_active",)


def run(steps: Steps) -> None:
    device = "cpu" if IS_REHEARSAL else "cuda"
    memcheck(steps, device)
    launch = [PYTHON, "scripts/gpu/launch.py", "--device", device]
    if shutil.which("ncu") is not None and not IS_REHEARSAL:
        options = ["--clock-control", "none", "--profile-from-start", "off"]
        launch = ["ncu", *options, "--metrics", ",".join(METRICS), *launch]
    elif not IS_REHEARSAL:
        steps.skip("profile", "ncu is not here")
        launch = []
    if launch:
        steps.run("profile", 30, launch)
    steps.run("tiles", 80, [PYTHON, "scripts/gpu/tiles.py", "--device", device])
    tokens = [PYTHON, "benchmarks/bench_token_loss.py", "--device", device]
    steps.run("tokens", 90, [*tokens, "--json", steps.results / "tokens.json"])
    command = [PYTHON, "benchmarks/speed.py", "--device", device, "--kernels", "--only", "image"]
    if IS_REHEARSAL:
        command += ["--seconds", "0.001", "--only", "forward, off"]
    steps.run("rivals", 60, [*command, "--json", steps.results / "rivals.json"])


def memcheck(steps: Steps, device: str) -> None:
    """Random calls under compute-sanitizer; where it cannot attach, it is as good as not here."""
    tool = [] if IS_REHEARSAL else ["compute-sanitizer", "--tool", "memcheck"]
    if tool:
        tool += ["--target-processes", "all", "--error-exitcode", "99"]
        probe = "import torch; torch.ones(1, device='cuda').sum()"
        if shutil.which(tool[0]) is None or not steps.run(
            "probe", 20, [*tool, PYTHON, "-c", probe]
        ):
            return steps.skip("memcheck", "compute-sanitizer is not here, or cannot attach")
    fuzz = [PYTHON, "tests/fuzz", "--device", device, "--no-check", "--calls", "12"]
    if IS_REHEARSAL:
        fuzz[-1] = "4"
    for backend in ("native",) if IS_REHEARSAL else ("triton", "native"):
        steps.run(f"memcheck-{backend}", 35, [*tool, *fuzz, "--backend", backend], ALONE)
