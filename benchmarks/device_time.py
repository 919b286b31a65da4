"""How a case is timed on a CUDA device: what the device needs for it, and what the host does.

Device: one graph per contender holds its calls on several copies of the case, in memory of their
own and together four times the L2 cache, so that every call finds its data in memory and no time of
the host's is in it. Host: until a call returns, in bursts that the device's queue takes whole.
GPU_REHEARSE=1 does the same on the CPU at a tiny size; a graph is then its calls in turn.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence

import torch

CACHES = 4  # times the L2 cache: what the copies of a case take together
MOST_COPIES = 64
LEAST_CALLS = 32  # between two events: what submitting the first graph takes counts for little
YARDSTICK_BYTES = 2**30  # a copy that no cache helps
IS_REHEARSAL = os.environ.get("GPU_REHEARSE") == "1"
BURST, BURSTS = (2, 2) if IS_REHEARSAL else (20, 9)


def applies(device: torch.device) -> bool:
    return device.type == "cuda" or IS_REHEARSAL


def copies(bytes_moved: int, device: torch.device) -> int:
    """How many copies of a case with so many bytes it takes."""
    if device.type != "cuda":
        return 2
    cache = CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, max(2, math.ceil(cache / max(1, bytes_moved))))


def measure(
    runs: dict[str, Sequence[Callable]],
    device: torch.device,
    seconds: float,
    waiting: Collection[str] = (),
) -> dict[str, dict]:
    """name -> calls, one per copy  =>  name -> p20, p50, p80 of the device's milliseconds a call,
    and of the host's; "not_captured" says why the device's are missing.

    waiting: names of those that wait for the device within a call, which no graph can hold.
    """
    graphs, found = {}, {name: {} for name in runs}
    for name, calls in runs.items():
        if name in waiting:
            found[name]["not_captured"] = "waits for the device within a call"
            continue
        try:
            graphs[name] = Graph(calls, device)
        except Exception as error:  # a row that says so; a broken device fails the next wait
            _wait(device)
            found[name]["not_captured"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for name, times in _in_turns(graphs, seconds).items():
        found[name] |= percentiles("ms", times) | {"copies": len(runs[name])}
    graphs.clear()
    for name, calls in runs.items():
        found[name] |= percentiles("host_ms", _host_times(calls[0], device))
    return found


class Graph:
    """Calls captured once; `replay()` runs them all and gives the milliseconds of one."""

    def __init__(self, calls: Sequence[Callable], device: torch.device):
        self.calls, self.device, self.graph = calls, device, None
        if device.type != "cuda":
            return
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # what a first call sets up is not for the graph
            for call in calls:
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            # Kept, so that every call writes to memory of its own.
            self.results = [call() for call in calls]
        self.replay()

    def replay(self) -> float:
        if self.graph is None:
            begin = time.perf_counter_ns()
            self.results = [call() for call in self.calls]
            return (time.perf_counter_ns() - begin) / 1e6 / len(self.calls)
        replays = math.ceil(LEAST_CALLS / len(self.calls))
        self.start.record()
        for _ in range(replays):
            self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / len(self.calls) / replays


def _in_turns(graphs: dict[str, Graph], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order, end, rounds = random.Random(0), time.perf_counter() + seconds, 0
    while graphs and (rounds < 5 or time.perf_counter() < end):
        for name in order.sample([*graphs], len(graphs)):
            times[name].append(graphs[name].replay())
        rounds += 1
    return times


def _host_times(call: Callable, device: torch.device) -> list[float]:
    """Milliseconds until a call returns: the mean of each burst."""
    times = []
    for _ in range(BURSTS):
        _wait(device)
        begin = time.perf_counter_ns()
        for _ in range(BURST):
            call()
        times.append((time.perf_counter_ns() - begin) / 1e6 / BURST)
    _wait(device)
    return times


def percentiles(prefix: str, times: Sequence[float]) -> dict[str, float | int]:
    values = torch.tensor(times, dtype=torch.float64)
    p = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    found = {f"{prefix}_p{n}": value for n, value in zip((20, 50, 80), p, strict=True)}
    return found | ({"rounds": len(times)} if prefix == "ms" else {})


def bandwidths(device: torch.device) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and of a read (torch.sum), each of a gibibyte."""
    elements = (YARDSTICK_BYTES if device.type == "cuda" else 2**24) // 4
    x, y = torch.randn(elements, device=device), torch.empty(elements, device=device)
    found = {}
    for name, call, streams in (("copy", lambda: y.copy_(x), 2), ("read", lambda: x.sum(), 1)):
        times = [_once(call, device) for _ in range(13)][3:]
        found[name] = streams * 4 * elements / statistics.median(times) / 1e6
    return found


def _once(call: Callable, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
