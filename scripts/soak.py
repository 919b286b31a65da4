"""A tiny run of the digits for hours, and what it takes more of: python scripts/soak.py --hours 2

Memory (resident) and open files of the process are noted every few seconds; after a fifth of the
time, in which caches fill, a line is laid through each by least squares, and its slope per hour is
printed, as JSON, with how far the notes lie from it; and what is resident in the end, once the C
library has given back what is free: where that does not grow, nothing is kept.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM = 0.2
OPTIONS = (
    "algorithm.group_size=4", "algorithm.prompts_per_rollout=4", "algorithm.num_inference_steps=3",
    "train.steps=10000000", "train.checkpointing_steps=50", "train.checkpoints_total_limit=2",
    "train.max_batch=16", "validation.num_prompts=4", "validation.num_inference_steps=2",
    "validation.steps=100",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args()
    os.chdir(ROOT)
    from flowkern.train.config import load_config
    from flowkern.train.loop import Loop
    from flowkern.train.quiet import quiet

    quiet()
    notes: list[tuple[float, float, int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = ROOT / "configs/digits/flow_grpo.yaml"
        config = load_config(path, [*OPTIONS, *options.overrides, f"output_dir={folder}/run"])
        loop = Loop(config)
        watch = threading.Thread(target=watched, args=(loop, options, notes), daemon=True)
        watch.start()
        status = loop.run()
    found = told(notes, options.hours)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    found["resident_mb_when_free_memory_is_given_back"] = resident()
    print(json.dumps(found, indent=1))
    return 0 if status == 128 + signal.SIGTERM else 1


def watched(loop: object, options: argparse.Namespace, notes: list) -> None:
    """Note until the time is over, then ask the run to stop, as anyone would."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < 3600 * options.hours:
        files = len(os.listdir("/proc/self/fd"))
        notes.append((passed / 3600, resident(), files, loop.global_step))
        time.sleep(options.every)
    os.kill(os.getpid(), signal.SIGTERM)


def resident() -> float:
    """MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def told(notes: list[tuple[float, float, int, int]], hours: float) -> dict[str, object]:
    import numpy as np

    warm = np.array([note for note in notes if note[0] >= WARM * hours], dtype=float)
    found: dict[str, object] = {"hours": hours, "notes": len(warm), "steps": int(warm[-1, 3])}
    for name, column in (("resident_mb", 1), ("open_files", 2)):
        slope, level = np.polyfit(warm[:, 0], warm[:, column], 1)
        off = warm[:, column] - (slope * warm[:, 0] + level)
        found[name] = {
            "first": warm[0, column],
            "last": warm[-1, column],
            "slope_per_hour": round(float(slope), 3),
            "off_the_line": round(float(off.std()), 3),
        }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
