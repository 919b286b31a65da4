"""The kernels and the trainer on a CUDA device: make gpu PART=A | B | C | D | E | all.

    python scripts/gpu PART [PART...]

A: versions, build, each call once, tests, timings. B: a whole iteration of a large model, and
every algorithm's demo. C: memcheck, the profiler, tiles, the token loss, torch.compile. D: what a
network call costs. E: whole iterations of FLUX.1-dev and of Wan. Each part has a limit, and so has
each of its steps; results go to the folder that FLOWKERN_RESULTS names, as they come.
GPU_REHEARSE=1 walks the same way on the CPU at a tiny size. Nothing is installed; wheels that
scripts/gpu/wheels.py put into build/wheels are unpacked beside. docs/gpu.md says what to make of
the results.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path

from steps import ROOT, Steps
from wheels import unpack

PARTS = {
    "A": ("part_a", 400),
    "B": ("part_b", 350),
    "C": ("part_c", 290),
    "D": ("part_d", 240),
    "E": ("part_e", 240),
}


def main(arguments: list[str]) -> int:
    names = [*PARTS] if arguments in ([], ["all"]) else arguments
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"PART: got {unknown[0]!r}, expected A, B, C, D, E or all", file=sys.stderr)
        return 2
    # A limit from outside ends the steps, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    results = Path(os.environ.get("FLOWKERN_RESULTS") or ROOT / "build/gpu").resolve()
    prepare(results)
    good = True
    for name in names:
        module, seconds = PARTS[name]
        begin, steps = time.monotonic(), Steps(name, seconds, results)
        try:
            importlib.import_module(module).run(steps)
        finally:
            steps.close()
        print(f"[{name}] {time.monotonic() - begin:.0f} s of at most {seconds}", flush=True)
        good &= steps.is_good
    print(f"results: {results}")
    return 0 if good else 1


def prepare(results: Path) -> None:
    """The environment of every step."""
    carried = unpack(ROOT / "build/wheels", ROOT / "build/site")
    paths = [*map(str, carried), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]),
        "PYTHONUNBUFFERED": "1",
        "FLOWKERN_RESULTS": str(results),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
