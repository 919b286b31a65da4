"""What a network call costs: precision, adapters, compiled blocks, a float8 base, larger networks.

    python scripts/gpu/network.py [--device cuda] [--only WORD,WORD] [--seconds 165]

Stable Diffusion 3.5 medium, FLUX.1-dev and Wan 2.1 1.3B by their published configurations, random
weights. Each case is a process of its own and has the device for itself when its turn comes, but
for what is compiled meanwhile, for later cases, of networks with a block of each sort. Goes to
network.json in the folder that FLOWKERN_RESULTS names, after each part of a case.
GPU_REHEARSE=1: all of them on a CPU, at a tiny size, with a compiler that makes no code.
"""

from __future__ import annotations

import os
import time

BEGIN = time.monotonic()
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each process
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # no context before processes fork
import argparse  # noqa: E402
import fcntl  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from network_cases import CASES, MODES, UTILIZATION, Case, compile_for, measure  # noqa: E402
from network_models import IS_REHEARSAL, ROOT, can_fork, operations  # noqa: E402

BESIDE = 1 if IS_REHEARSAL else 8  # processes that count and compile
COUNTED = "TFLOP of a row"


class Results:
    """network.json, to which several processes write."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.lock = folder / "network.json", folder / "network.lock"

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def note(self, case: str, part: str, found: Any) -> None:
        with self.lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            whole = self.read()
            whole.setdefault(case, {})[part] = found
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(whole, indent=1) + "\n")
            partial.replace(self.path)
        print(f"{time.monotonic() - BEGIN:5.1f} s  {case} | {part}: {found}", flush=True)


@dataclass
class Job:
    """A process of its own session, ended with all that it started."""

    name: str
    target: Callable
    arguments: tuple
    case: Case | None = None
    process: Any = None
    ready: Any = None
    turn: Any = None
    begin: float = 0.0
    needs: list[Job] = field(default_factory=list)

    def start(self, context) -> None:
        self.ready, self.turn = context.Event(), context.Event()
        arguments = self.case is None, self.name, self.ready, self.turn, *self.arguments
        self.process = context.Process(target=_work, args=(self.target, *arguments))
        self.process.start()

    @property
    def is_over(self) -> bool:
        return self.process is not None and not self.process.is_alive()

    def end(self) -> None:
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()  # it had no session yet, or is over
        self.process.join()


def _work(
    target: Callable, is_beside: bool, name: str, ready, turn, folder: Path, *arguments: Any
) -> None:
    """In the process: what is raised outside a part is noted, too."""
    os.setsid()
    if is_beside:
        os.nice(10)
    results, status = Results(folder), 0
    try:
        target(results, lambda: _take(ready, turn), *arguments)
    except BaseException as error:  # a fault of one case
        traceback.print_exc()
        results.note(name, "error", f"{type(error).__name__}: {error}"[:600])
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing of what a compiler keeps open may hold it


def _take(ready, turn) -> None:
    ready.set()
    turn.wait()


def count(results: Results, turn: Callable, family: str) -> None:
    results.note(COUNTED, family, vars(operations(family)))


def compile_ahead(results: Results, turn: Callable, case: Case, mode: str, device: str) -> None:
    """For the cache that all share."""
    compile_for(case, torch.device(device), (mode,), lambda *a: results.note(case.name, *a))


def run_case(results: Results, turn: Callable, case: Case, device: str) -> None:
    counted = results.read()[COUNTED][case.family]
    measure(case, torch.device(device), counted, lambda *a: results.note(case.name, *a), turn)


def jobs_of(cases: list[Case], folder: Path, device: str) -> tuple[list[Job], list[Job]]:
    """Those that prepare, and those that take turns, in order."""
    counts = {
        each: Job(COUNTED, count, (folder, each)) for each in dict.fromkeys(c.family for c in cases)
    }
    before, after = [*counts.values()], []
    for case in cases:
        needs = [counts[case.family]]
        if case.is_compiled:
            needs += [Job(case.name, compile_ahead, (folder, case, mode, device)) for mode in MODES]
        before += needs[1:]
        after.append(Job(case.name, run_case, (folder, case, device), case, needs=needs))
    return before, after


def advance(before: list[Job], after: list[Job], results: Results, context) -> bool:
    """Start what can be, give the next its turn, end what is out of time; whether more is left."""
    now = time.monotonic()
    active = [j for j in before if j.process is not None and not j.is_over]
    waiting = [j for j in before if j.process is None]
    for job in waiting[: BESIDE - len(active)]:
        job.start(context)
    for job in after:
        if job.process is None and all(need.is_over for need in job.needs):
            job.start(context)
    taking = [j for j in after if j.begin and not j.is_over]
    for job in taking:
        if now - job.begin > job.case.limit * (5 if IS_REHEARSAL else 1):
            job.end()
            results.note(job.name, "error", f"out of time: {job.case.limit:.0f} s")
    ready = [j for j in after if j.ready and j.ready.is_set() and not j.begin and not j.is_over]
    if not taking and ready:
        ready[0].begin = now
        ready[0].turn.set()
    return not all(job.is_over for job in after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="the cases whose names have all these words")
    parser.add_argument("--seconds", type=float, default=165.0 * (5 if IS_REHEARSAL else 1))
    options = parser.parse_args()
    words = [word.strip() for word in options.only.split(",")]
    cases = [case for case in CASES if all(word in case.name for word in words)]
    if not cases:
        parser.error(f"--only: no case has {options.only!r}: {', '.join(c.name for c in CASES)}")
    folder = Path(os.environ.get("FLOWKERN_RESULTS") or ROOT / "build/gpu").resolve()
    results = Results(folder)
    results.path.unlink(missing_ok=True)
    results.note("about", "torch", torch.__version__)
    results.note("about", "utilization", UTILIZATION)
    before, after = jobs_of(cases, folder, options.device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        is_forked = can_fork(options.device)
        context = multiprocessing.get_context("fork" if is_forked else "spawn")
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            while advance(before, after, results, context):
                if time.monotonic() - BEGIN > options.seconds:
                    break
                time.sleep(0.05)
        finally:
            for job in before + after:
                if not job.is_over and job in after:
                    results.note(job.name, "error", "no time left")
                job.end()
    found = results.read()
    has_failed = [c.name for c in cases if "error" in json.dumps(found.get(c.name, "error"))]
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
