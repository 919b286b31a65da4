"""What a call costs the host on its way to a CUDA launch, on any machine: no GPU is needed.

    python benchmarks/host_time.py [--calls 3000]

The launch is one of the stub driver's (tests/ops/stub_driver): recorded, and nothing runs;
docs/log.md has what a real one adds. Tensors of the CPU stand for a device's, whose allocation
costs more. Printed are the best call and the 5th percentile, in microseconds: what the machine
takes away elsewhere is no part of them. With a GPU at hand benchmarks/speed.py has the host's time
beside the device's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "ops"))

import calls
import stub_driver
import torch


def best_and_fifth_percentile(call, count: int) -> tuple[float, float]:
    for _ in range(count // 10 + 1):
        call()
    times = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    times.sort()
    return times[0] / 1e3, times[count // 20] / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    options = parser.parse_args()
    if reason := stub_driver.why_not():
        sys.exit(f"host_time: {reason}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        driver = stub_driver.load(Path(folder))
        problems = [calls.Problem(call, 8, 65_536) for call in calls.take(calls.FEW)]
        module = stub_driver.native_kernels(Path(folder))
        with stub_driver.tensors_on_cuda(), stub_driver.native_on(module):
            print(f"{'native, stub driver':36}{'best':>8}{'p5':>8} us{'launches':>10}")
            for p in problems:
                for learn in (False, True)[: 2 if p.call.learned else 1]:
                    run = lambda p=p, learn=learn: p.run("native", learn)  # noqa: E731
                    driver.clear()
                    run()
                    launches = driver.count
                    best, fifth = best_and_fifth_percentile(run, options.calls)
                    name = f"{p.call}{', both ways' if learn else ''}"
                    print(f"{name:36}{best:8.1f}{fifth:8.1f}   {launches:10}", flush=True)


if __name__ == "__main__":
    main()
