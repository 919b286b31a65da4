"""How much of a sample a Triton program should take: python scripts/gpu/tiles.py [--device cuda]

Device time of each call for every (elements, warps) of a program, against what rows_triton.tile
chooses and the native kernel. First all are compiled, in many processes, then timed in one, from
graphs as the benchmark does. A line of JSON per call, dtype and size goes to tiles.jsonl in the
folder that FLOWKERN_RESULTS names. GPU_REHEARSE=1 times the CPU's kernels, which have no tiles, to
walk the same way.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "ops"), str(ROOT / "benchmarks")]
import device_time  # noqa: E402
from calls import Problem  # noqa: E402

IS_REHEARSAL = os.environ.get("GPU_REHEARSE") == "1"
# By the names of tests/ops/calls.py; a replay also without its gradient.
TIMED = ["sde_step", "sde_step, noise given", "sde_log_prob, forward", "sde_log_prob"]
TIMED += ["policy_loss", "policy_loss, drawn again", "matching_loss", "add_noise"]
TILES = [(512, 2), (512, 4), (1024, 2), (1024, 4), (1024, 8)]
TILES += [(2048, 4), (2048, 8), (4096, 8), (4096, 16)]
SIZES = (4_096,) if IS_REHEARSAL else (65_536, 2_096_640)
DTYPES = ("float32", "bfloat16")
ROUNDS = 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", help="one call, all tiles, once")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.compile:
        return _compile(options.compile, device)
    if not IS_REHEARSAL:
        _compile_apart()
    results = Path(os.environ.get("FLOWKERN_RESULTS") or ROOT / "build/gpu")
    results.mkdir(parents=True, exist_ok=True)
    with (results / "tiles.jsonl").open("w") as file:
        for size in SIZES[::-1]:
            for dtype in DTYPES:
                for name in TIMED[:2] if IS_REHEARSAL else TIMED:
                    line = {"call": name, "size": size, "dtype": dtype}
                    line["us"] = _times(name, size, getattr(torch, dtype), device)
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    print(*line.values(), sep=", ", flush=True)
    return 0


def _with_tile(tile: tuple[int, int] | None, run):
    """What `run` gives where a program takes this tile; None: what is chosen for it."""
    if IS_REHEARSAL or tile is None:
        return run()
    from flowkern.ops._common import rows_triton

    chosen = rows_triton.tile
    rows_triton.tile = lambda grown: tile
    try:
        return run()
    finally:
        rows_triton.tile = chosen


def _compile_apart() -> None:
    runs = [
        subprocess.Popen([sys.executable, __file__, "--compile", name], stderr=subprocess.DEVNULL)
        for name in TIMED
    ]
    for run in runs:
        run.wait()


def _problem(name: str, size: int, dtype: torch.dtype, device: torch.device):
    """The arguments of a timed call, and what makes it of them by a backend."""
    p = Problem(name.removesuffix(", forward"), 8, size, dtype, device=device)
    return p, lambda p, backend: p.run(backend, learn=not name.endswith(", forward"))


def _compile(name: str, device: torch.device) -> int:
    for dtype in DTYPES:
        p, run = _problem(name, SIZES[0], getattr(torch, dtype), device)
        for tile in TILES:
            try:
                _with_tile(tile, lambda: run(p, "triton"))  # noqa: B023
            except Exception as error:  # told when it is timed
                print(f"{name}, {tile}: {error}", file=sys.stderr)
    torch.cuda.synchronize(device)
    return 0


def _times(
    call: str, size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float | str]:
    """Microseconds by tile, and of the native kernel, in turns: the median."""
    first, run = _problem(call, size, dtype, device)
    copies = [first, *[first.to(device) for _ in range(1 if size > 2**20 else 15)]]
    graphs, found = {}, {}
    for tile in ["native", None, *TILES]:
        name = "chosen" if tile is None else tile if tile == "native" else f"{tile[0]}/{tile[1]}"
        is_triton = tile != "native" and not IS_REHEARSAL
        backend = "triton" if is_triton else "native"
        calls = [lambda p=p, backend=backend: run(p, backend) for p in copies]
        make = functools.partial(device_time.Graph, calls, device)
        try:
            graphs[name] = _with_tile(tile if is_triton else None, make)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    times = [{name: 1e3 * graph.replay() for name, graph in graphs.items()} for _ in range(ROUNDS)]
    for name in graphs:
        found[name] = round(sorted(turn[name] for turn in times)[ROUNDS // 2], 2)
    return found


if __name__ == "__main__":
    begin = time.perf_counter()
    status = main()
    print(f"{time.perf_counter() - begin:.0f} s")
    sys.exit(status)
