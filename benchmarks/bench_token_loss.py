"""The fused token loss, forward and backward, against its own GEMMs alone and against its rivals.

    python benchmarks/bench_token_loss.py [--device cpu|cuda] [--json PATH] [--seconds S]
        [--row-seconds S] [--only V=50257]

The bound is the same chunk loop with the same buffers and a row kernel that does nothing. It and
flowkern take turns, then each rival and flowkern. Every contender is gated on its gradients. On a
CPU a row ends when its time is over, with the rounds that it had by then. GPU_REHEARSE=1 goes
through a device's rows at a tiny size. Writes the JSON file after each row, into the folder that
FLOWKERN_RESULTS names or benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import device_time
import torch
from harness import describe_machine, results_folder
from token_problem import Problem, Shape, liger_loss
from torch import Tensor

from flowkern.ops.token_loss import chunks
from flowkern.ops.token_loss.chunks import Wanted, chunk_rows
from flowkern.ops.token_loss.inputs import Head, Objective, Tokens

GPU = Shape(8192, 3584, 152_064, torch.bfloat16, 2**30)
REHEARSAL = Shape(600, 24, 1003, torch.bfloat16, 2**10)
GPU_OTHERS = (
    Shape(1024, 3584, 152_064, torch.bfloat16, 2**30),
    Shape(32_768, 3584, 152_064, torch.bfloat16, 2**30),
    Shape(8192, 4096, 128_256, torch.bfloat16, 2**30),
    Shape(8192, 768, 50_257, torch.bfloat16, 2**28),
)
CPU = (
    Shape(1024, 512, 32_768, torch.float32, 2**25),
    Shape(1024, 512, 50_257, torch.float32, 2**25),
    Shape(512, 512, 151_936, torch.float32, 2**25),
    Shape(1024, 512, 32_768, torch.bfloat16, 2**24),
    Shape(512, 512, 151_936, torch.bfloat16, 2**24),
)
GATE = Shape(1024, 512, 32_768, torch.bfloat16, 2**24)
TILES = ((4096, 8), (8192, 16), (16384, 32), (2048, 4), (4096, 4), (8192, 8))


class OutOfTime(Exception):
    pass


@contextmanager
def ends_after(seconds: float | None) -> Iterator[None]:
    """Raises OutOfTime between two ops of torch; one op takes what it takes."""
    if seconds is None:
        yield
        return

    def stop(*_):
        raise OutOfTime(f"more than {seconds:.0f} s")

    kept = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


class Bench:
    def __init__(self, device: torch.device, path: Path, seconds: float, row_seconds: float | None):
        self.device, self.path, self.end = device, path, time.perf_counter() + seconds
        self.row_seconds = row_seconds
        self.result = {
            "machine": describe_machine(device),
            "command": " ".join(sys.argv),
            "rows": [],
        }

    def note(self, row: dict) -> None:
        """What is cut short counts."""
        self.result["rows"].append(row)
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    def attempt(self, name: str, shape: Shape, measure: Callable[[], dict]) -> None:
        row = {"name": name, "shape": str(shape)}
        begin = time.perf_counter()
        if begin > self.end:
            return self.note(row | {"skipped": "out of time"})
        try:
            with ends_after(self.row_seconds):
                row |= measure()
        except Exception as error:  # a row that says so
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        self._forget()
        return self.note(row | {"took_s": round(time.perf_counter() - begin, 2)})

    def once(self, run: Callable) -> float:
        """Milliseconds of one call."""
        return device_time._once(run, self.device)

    def times(self, runs: dict[str, Callable], rounds: int, warm: int = 2) -> dict[str, dict]:
        begin = time.perf_counter()
        for _ in range(warm):
            for run in runs.values():
                run()
        found = {name: [] for name in runs}
        a_round = (time.perf_counter() - begin) / max(1, warm)
        for turn in range(rounds):
            left = self.row_seconds and self.row_seconds - (time.perf_counter() - begin)
            if turn and left is not None and left < 1.5 * a_round:
                break
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                found[name].append(self.once(runs[name]))
        return {
            name: device_time.percentiles("ms", ms) | {"min_ms": min(ms)}
            for name, ms in found.items()
        }

    def memory(self, run: Callable) -> dict:
        """Bytes over what was there before, gradients included."""
        self._forget()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            made = run()
            peak = torch.cuda.max_memory_allocated() - before
        elif CLEAR_PEAK.exists():
            CLEAR_PEAK.write_text("5")
            before = resident("VmRSS")
            made = run()
            peak = resident("VmHWM") - before
        else:
            return {}
        kept = sum(x.nbytes for x in made)
        return {"peak_bytes": peak, "result_bytes": kept, "extra_bytes": peak - kept}

    def _forget(self) -> None:
        chunks._kept.__dict__.clear()  # the memory that a thread keeps for logits
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


CLEAR_PEAK = Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """Bytes of memory that this process has, or has had at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def gemms(problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """The three GEMMs of flowkern's loop with its buffers, and nothing between them."""
    p, numbers = problem, Objective(problem.kl_coef, 0.0, -1.0, 1.0, 9.0, 9.0)
    head = Head(p.weight.detach(), None, 1.0, None, p.shape.budget)
    tokens = Tokens(p.hidden.detach(), p.ids, p.old, p.advantage, p.token_weight, p.ref, None)
    idle = SimpleNamespace(policy_rows=lambda *_: None)
    wanted = Wanted(True, True, False)
    return lambda: chunks.policy_pass(idle, tokens, head, numbers, wanted).gradients[:2]


def gate(bench: Bench) -> None:
    """Errors against float64, of which flowkern's may be twice eager's."""
    shape = GATE if bench.device.type == "cuda" else Shape(300, 64, 1000, torch.bfloat16, 2**20)
    p = Problem(shape, bench.device)
    truth = p.truth()
    eager = p.errors(p.eager()(), truth)

    def measure() -> dict:
        ours = p.errors(p.flowkern()(), truth)
        good = all(a <= 2 * b + 1e-6 for a, b in zip(ours.values(), eager.values(), strict=True))
        return {"flowkern": ours, "eager": eager, "passed": good}

    bench.attempt("gate", shape, measure)
    bench.attempt("ratio to itself", shape, lambda: {"exactly_1": p.ratio_is_one()})


def against_gemms(bench: Bench, shape: Shape, rounds: int) -> None:
    def measure() -> dict:
        p = Problem(shape, bench.device)
        runs = {"gemms": gemms(p), "flowkern": p.flowkern()}
        memory = bench.memory(runs["flowkern"])
        found = bench.times(runs, rounds, 1 if bench.row_seconds else 2)
        ratio = found["flowkern"]["ms_p50"] / found["gemms"]["ms_p50"]
        itemsize = chunks.gemm_dtype(bench.device, shape.dtype).itemsize
        rows = chunk_rows(shape.tokens, shape.vocabulary, itemsize, shape.budget)
        limit = rows * shape.vocabulary * itemsize + 4 * p.weight.numel()
        if memory:
            memory["peak_of_limit"] = memory["peak_bytes"] / limit
        said = {"ratio": ratio, "chunk_rows": rows, "logits_and_float32_dW": limit}
        return said | memory | found

    bench.attempt("flowkern against its GEMMs", shape, measure)


def rivals(bench: Bench, shape: Shape, rounds: int) -> None:
    p = Problem(shape, bench.device)
    runs = {
        "eager": p.eager,
        "torch.compile": p.compiled,
        "liger": lambda: liger_loss(p, "highest"),
        "linear_log_prob, two phases": p.two_phase,
    }
    if bench.device.type == "cuda":
        runs["liger, TF32"] = lambda: liger_loss(p, "high")
    truth: list[Tensor] = []
    for name, make in runs.items():

        def measure(make=make) -> dict:
            run = make()
            made = run()[1:]
            truth.extend(made if not truth else ())  # eager comes first; else nothing to compare
            error = p.apart(made, truth)
            both = {"": run, "flowkern": p.flowkern()}
            found = bench.times(both, rounds, 1 if bench.device.type == "cuda" else 0)
            return {"from_eager": error} | found.pop("") | found | bench.memory(run)

        bench.attempt(name, shape, measure)


def parts(bench: Bench, shape: Shape) -> None:
    """The row kernel in several tiles, and each GEMM of a chunk."""
    from flowkern.ops.token_loss import triton_impl

    p = Problem(shape, bench.device)
    rows = chunk_rows(shape.tokens, shape.vocabulary, p.hidden.element_size(), shape.budget)
    h, w = p.hidden.detach()[:rows], p.weight.detach()
    z, dh, dw = h @ w.t(), torch.empty_like(h), torch.empty(w.shape, device=h.device)
    head, out = Head(w, None, 1.0, None, 0), chunks.Statistics.empty(rows, h.device)
    given = (p.old, p.advantage, p.token_weight, p.ref)
    tokens = Tokens(h, p.ids[:rows], *(x[:rows] for x in given), None)
    numbers = Objective(p.kl_coef, 0.0, -0.2, 0.2, 1.0, 9.0)
    kept = triton_impl.TILE
    for tile in TILES:

        def measure(tile=tile) -> dict:
            triton_impl.TILE = tile
            policy = (z, head, tokens, numbers, out)
            found = bench.times(
                {
                    "forward": lambda: triton_impl.policy_rows(*policy, False),
                    "forward, gradient": lambda: triton_impl.policy_rows(*policy, True),
                },
                5,
            )
            least = 3 * z.nbytes / found["forward, gradient"]["ms_p50"] / 1e6
            return found | {"GB_per_s_of_three_passes": least}

        bench.attempt(f"row kernel, tile {tile}", shape, measure)
    triton_impl.TILE = kept
    f32 = {"out_dtype": torch.float32, "out": dw}
    runs = {
        "logits": lambda: torch.mm(h, w.t(), out=z),
        "dX": lambda: torch.mm(z, w, out=dh),
        "dW, float32, first": lambda: torch.mm(z.t(), h, **f32),
        "dW, float32, added": lambda: torch.addmm(dw, z.t(), h, **f32),
        "dW, bf16": lambda: torch.mm(z.t(), h),
        "dW to bf16": lambda: dw.bfloat16(),
    }
    bench.attempt(f"parts of a chunk of {rows}", shape, lambda: bench.times(runs, 5))


def budgets(bench: Bench, shape: Shape) -> None:
    for budget in (2**28, 2**29, 2**31, 2**32):
        against_gemms(bench, shape._replace(budget=budget), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--seconds", type=float, help="after which nothing begins")
    parser.add_argument(
        "--only", default="", help="shapes with these words; the file's others stay"
    )
    parser.add_argument("--row-seconds", type=float, help="after which a row ends; 25 on a CPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    folder = results_folder(device, describe_machine(device))
    path = options.json or folder / "tokens.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = device.type == "cpu"
    row_seconds = options.row_seconds or (25 if on_cpu else None)
    bench = Bench(device, path, options.seconds or (270 if on_cpu else 55), row_seconds)
    if options.only and path.exists():
        rows = json.loads(path.read_text())["rows"]
        bench.result["rows"] = [r for r in rows if options.only not in r["shape"]]
    else:
        gate(bench)
    if device.type == "cuda":
        of_device(bench)
    elif device_time.IS_REHEARSAL:
        against_gemms(bench, REHEARSAL, 2)
        rivals(bench, REHEARSAL, 2)
    else:
        shapes = [shape for shape in CPU if options.only in str(shape)]
        for shape in shapes:
            against_gemms(bench, shape, 5)
        for shape in shapes:
            rivals(bench, shape, 3)


def of_device(bench: Bench) -> None:
    against_gemms(bench, GPU, 11)
    parts(bench, GPU)
    rivals(bench, GPU, 5)
    for shape in GPU_OTHERS:
        against_gemms(bench, shape, 5)
    budgets(bench, GPU)


if __name__ == "__main__":
    main()
