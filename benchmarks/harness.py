"""How everything here is timed, and what it was timed on.

A case is gated on correctness, then its contenders are called in turns, round after round, each in
another order, so that whatever else the machine does falls on all of them alike. Buffers are
allocated before. Reported: the 20th, 50th and 80th percentile. Kernels on a CUDA device are timed
as device_time.py says.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import device_time
import torch

ROOT = Path(__file__).resolve().parents[1]
YARDSTICK = "torch.sum of the same data"
# Eight latents of a 512-pixel image.
IMAGE = (8, 4_096 if device_time.IS_REHEARSAL else 65_536)


def video(device: torch.device) -> tuple[int, int]:
    """Latents of a video: four, or on CUDA eight."""
    size = 20_480 if device_time.IS_REHEARSAL else 2_096_640
    return (8 if device_time.applies(device) else 4), size


def random_source(shape, device: torch.device, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Normals of a seed, other ones at each call; drawn where they will be."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda: torch.randn(shape, generator=generator, device=device).to(dtype)


@dataclass
class Contender:
    """`run()` does the work once and returns a tuple of tensors, which `Case.check` sees."""

    name: str
    run: Callable
    note: str = ""
    waits: bool = False  # for the device, within a call: a graph cannot hold it
    made: tuple | None = None  # what `run()` has returned, if it was called already


def ours(device: torch.device, call: Callable, note: str = "") -> list[Contender]:
    """flowkern: `call(backend)` with its own choice; on CUDA with each kernel backend by name, too.

    These rows are what the choice rests on.
    """
    import flowkern

    contenders = [Contender("flowkern", lambda: call(None), note)]
    if device.type == "cuda":
        ready = [name for name, reason in flowkern.backends(device).items() if reason is None]
        for name in sorted({"triton", "native"}.intersection(ready)):
            contenders.append(Contender(f"flowkern, {name}", lambda name=name: call(name), note))
    return contenders


@dataclass
class Case:
    """One line of the table: contenders that do the same work, and how to tell that they do."""

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    contenders: list[Contender]
    check: Callable[..., float] | None = None  # outputs of a contender -> its error
    allowed: float = 0.0  # the largest error that passes
    bytes_moved: int = 0  # what the best possible implementation reads and writes
    # Which bandwidth bytes_moved compares with: "copy" | "read", cached where the cache holds them.
    bandwidth: str = "copy"
    reads: Sequence[torch.Tensor] = ()  # summed in turn with the contenders: the read bandwidth
    rounds: int | None = None
    again: Callable[[], Case] | None = None  # the same on other memory


class Clock:
    """Milliseconds of a call by the host's clock; on CUDA until its work is done."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, run: Callable) -> float:
        begin = time.perf_counter_ns()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter_ns() - begin) / 1e6


def interleaved(
    runs: dict[str, Callable], clock: Clock, seconds: float, rounds: int | None = None
) -> dict[str, dict]:
    """p20, p50 and p80 of each, called in turns for `seconds` in all, or for `rounds`.

    Every round has another order: what a contender finds in the caches is not always the same
    one's leavings.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    if rounds is None:  # a case with few rounds is too long to be run for nothing
        for run in runs.values():
            for _ in range(3):
                run()
    end = time.perf_counter() + seconds
    order, count = random.Random(0), 0
    while (count < rounds) if rounds is not None else (count < 5 or time.perf_counter() < end):
        for name in order.sample([*runs], len(runs)):
            times[name].append(clock(runs[name]))
        count += 1
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    result = {}
    for name, values in times.items():
        p = torch.quantile(torch.tensor(values, dtype=torch.float64), quantiles).tolist()
        result[name] = {"ms_p20": p[0], "ms_p50": p[1], "ms_p80": p[2], "rounds": len(values)}
    return result


def run_case(
    case: Case, device: torch.device, seconds: float, bandwidths: dict[str, float]
) -> list[dict]:
    """Gate, time, and describe each contender: rows for the table and the JSON."""
    rows, runs = [], {}
    for contender in case.contenders:
        row = {"op": case.op, "case": case.name, "backend": contender.name, "note": contender.note}
        row |= {"shape": list(case.shape), "dtype": case.dtype}
        try:
            outputs = contender.made or contender.run()
        except Exception as error:  # a rival that cannot run here is a row that says so
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        else:
            row["error"] = case.check(*outputs) if case.check else None
            if row["error"] is not None and not row["error"] <= case.allowed:
                row["failed"] = f"wrong: error {row['error']:.3g}, allowed {case.allowed:.3g}"
            else:
                runs[contender.name] = contender.run
        rows.append(row)
    if case.reads:
        runs[YARDSTICK] = lambda: [x.sum() for x in case.reads]
    timed = _timed(case, runs, device, seconds) if runs else {}
    if case.reads:
        row = {"op": case.op, "case": case.name, "backend": YARDSTICK, "shape": list(case.shape)}
        rows.append(row | {"dtype": case.dtype, "note": "a yardstick, not a rival"})
        moved = sum(x.numel() * x.element_size() for x in case.reads)
        bandwidths = bandwidths | {"read": moved / timed[YARDSTICK]["ms_p50"] / 1e6}
    feed = case.bandwidth
    if (
        not case.reads
        and case.bytes_moved <= last_level_cache()
        and f"{feed}, cached" in bandwidths
    ):
        feed += ", cached"
    for row in rows:
        row |= timed.get(row["backend"], {})
        if case.bytes_moved and "ms_p50" in row:
            row["gb_per_s"] = case.bytes_moved / row["ms_p50"] / 1e6
            row["of_bandwidth"] = row["gb_per_s"] / bandwidths[feed]
    chosen = next(
        (r["ms_p50"] for r in rows if r["backend"].startswith("flowkern") and "ms_p50" in r), None
    )
    for row in rows:
        is_rival = row["backend"] != YARDSTICK and not row["backend"].startswith("flowkern")
        if chosen and "ms_p50" in row and is_rival:
            row["flowkern_is_faster_by"] = row["ms_p50"] / chosen
    return rows


def _timed(case: Case, runs: dict[str, Callable], device, seconds: float) -> dict[str, dict]:
    """By the clock that suits: kernels on a CUDA device from graphs, on copies of the case."""
    if case.again is None or not device_time.applies(device):
        return interleaved(runs, Clock(device), seconds, case.rounds)
    more = device_time.copies(case.bytes_moved, device) - 1
    others = [case.again() for _ in range(more)]
    calls = {name: [run] for name, run in runs.items()}
    for other in others:
        for contender in other.contenders:
            if contender.name in calls:
                calls[contender.name].append(contender.run)
        if other.reads:
            calls[YARDSTICK].append(lambda other=other: [x.sum() for x in other.reads])
    waiting = {contender.name for contender in case.contenders if contender.waits}
    return device_time.measure(calls, device, seconds, waiting)


def rotating(make: Callable[..., Case], *arguments, **options) -> Case:
    """The case that `make` makes, which knows how to be made again."""
    case = make(*arguments, **options)
    case.again = functools.partial(make, *arguments, **options)
    return case


def measure_bandwidths(
    device: torch.device, seconds: float, elements: int = 4 * 2_096_640
) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and of a read (torch.sum), at video size; on the CPU
    also at image size, "cached".
    """
    if device_time.applies(device):
        return device_time.bandwidths(device)
    found = {}
    for feed, n in (("", elements), (", cached", 8 * 65_536)):
        x, y = torch.randn(n, device=device), torch.empty(n, device=device)
        runs = {"copy": lambda x=x, y=y: y.copy_(x), "read": lambda x=x: x.sum()}
        timed = interleaved(runs, Clock(device), seconds)
        moved = {"copy": 8 * n, "read": 4 * n}
        found |= {name + feed: moved[name] / t["ms_p50"] / 1e6 for name, t in timed.items()}
    return found


def last_level_cache() -> int:
    """Bytes: what a call moves beyond it comes from memory."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text()
        return int(size.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


def describe_machine(device: torch.device) -> dict:
    """What a figure depends on: processor, threads, versions, commit."""
    import flowkern

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flowkern": flowkern.__version__,
    }
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    about = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        **versions,
    }
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    else:
        from flowkern.ops._common import native

        about["instruction_set"] = native.cpu().isa() if native.cpu() else None
    about["backends"] = flowkern.backends(device)
    about["utc"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    # A name that is given counts: a tree that was carried here is not what its .git says.
    named = os.environ.get("FLOWKERN_COMMIT")
    about["commit"] = named or _git("rev-parse", "--short", "HEAD")
    about["dirty"] = not named and bool(_git("status", "--porcelain", "-uno"))
    return about


def can_fork(device: str) -> bool:
    """Whether a forked process has the device: not where something imported has taken it before."""
    if device == "cpu":
        return True
    probe = multiprocessing.get_context("fork").Process(
        target=torch.zeros, args=(1,), kwargs={"device": device}
    )
    probe.start()
    probe.join(60)
    return probe.exitcode == 0


def recorded(path: Path, *keys: str) -> dict:
    """The JSON of an earlier run. Exits with a line for what is none, or has not these keys."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read as a result: {error}") from None
    missing = [key for key in keys if not isinstance(result, dict) or key not in result]
    if missing:
        raise SystemExit(f"{path}: has no {missing[0]!r}, which a result of this benchmark has")
    return result


def at_least_one(text: str) -> int:
    """A number on a command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number


def results_folder(device: torch.device, machine: dict) -> Path:
    """Where results go: the folder that FLOWKERN_RESULTS names, else one for what they were
    measured on.
    """
    named = os.environ.get("FLOWKERN_RESULTS")
    return Path(named) if named else ROOT / "benchmarks/results" / device_slug(device, machine)


def device_slug(device: torch.device, machine: dict) -> str:
    """A folder name for results: what they were measured on."""
    name = (
        machine["gpu"]
        if device.type == "cuda"
        else f"{machine['processor']} {machine['threads']} threads"
    )
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].replace("(R)", "").strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # a kernel machine may have no git
        return None
    return run.stdout.strip() if run.returncode == 0 else None
