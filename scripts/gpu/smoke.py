"""The first call of every kernel, each in a process of its own, against the CPU's reference.

    python scripts/gpu/smoke.py --backend triton [--device cuda] [--call "policy_loss" ...]

The calls are those of tests/ops/calls.py that compile. Launches are waited for one by one
(CUDA_LAUNCH_BLOCKING=1), so that a fault is named by its call; it takes no other process along. A
line of JSON per call goes to smoke.jsonl in the folder that FLOWKERN_RESULTS names, when it is
done; what a failed one said goes to smoke.log.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "ops"))
IS_REHEARSAL = os.environ.get("GPU_REHEARSE") == "1"
SHAPES = ((8, 4_099),) if IS_REHEARSAL else ((8, 4_099), (2, 65_536))
DTYPES = ("float32", "bfloat16")
REHEARSED = ("policy_loss",)
WITHOUT_NATIVE = ("has no native kernel there", lambda call: call.op == "guidance")
# Of the largest value: sums of 65,536 terms in float32; a last place of bfloat16.
RELATIVE = {"torch.float32": 1e-3, "torch.bfloat16": 2**-7}
SECONDS = 200 if IS_REHEARSAL else 50  # of one call, Triton's compiler included


def main() -> int:
    options = _arguments()
    if options.here:
        return _here(options.call[0], options.backend, options.device)
    from calls import FEW, take

    few = [FEW, WITHOUT_NATIVE] if options.backend == "native" else [FEW]
    names = options.call or (REHEARSED if IS_REHEARSAL else map(str, take(*few)))
    results = Path(os.environ.get("FLOWKERN_RESULTS") or ROOT / "build/gpu")
    results.mkdir(parents=True, exist_ok=True)
    workers = min(14, max(2, (os.cpu_count() or 2) - 2))
    good = True
    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(_apart, name, options) for name in names]):
            line, log = done.result()
            with (results / "smoke.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if not line["ok"]:
                with (results / "smoke.log").open("a") as file:
                    file.write(f"== {line['call']}, {line['backend']}\n{log}\n")
            print(f"{line['call']}, {line['backend']}: {line.get('why', 'ok')}", flush=True)
            good &= line["ok"]
    return 0 if good else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--call", action="append", help="this call alone; may be repeated")
    parser.add_argument("--here", action="store_true", help="the one call in this process")
    return parser.parse_args()


def _apart(name: str, options: argparse.Namespace) -> tuple[dict, str]:
    """The call in a process of its own: its line, and what it said."""
    from calls import BY_NAME

    command = [sys.executable, __file__, "--here", "--backend", options.backend]
    command += ["--device", options.device, "--call", name]
    line = {"call": name, "op": BY_NAME[name].op, "backend": options.backend}
    begin = time.perf_counter()
    try:
        run = subprocess.run(
            command, env=os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}, capture_output=True,
            text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return line | {"ok": False, "why": f"not done in {SECONDS} s"}, str(error.stderr)
    line["seconds"] = round(time.perf_counter() - begin, 1)
    last = (run.stdout.strip().splitlines() or [""])[-1]
    if run.returncode == 0:
        return line | {"ok": True} | json.loads(last), ""
    said = (run.stderr.strip().splitlines() or ["nothing said"])[-1]
    return line | {"ok": False, "why": f"exit status {run.returncode}: {said}"}, run.stderr


def _here(name: str, backend: str, device: str) -> int:
    faulthandler.enable()
    import torch
    from calls import Problem

    worst = {}
    for shape in SHAPES:
        for dtype in (getattr(torch, name) for name in DTYPES):
            host = Problem(name, *shape, dtype)
            got = host.to(torch.device(device)).run(backend)
            wanted = host.run("reference")
            errors = [_error(x.cpu(), y) for x, y in zip(got, wanted, strict=True)]
            worst[f"{shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}"] = max(errors)
    print(json.dumps({"error_of_allowed": worst}))
    bad = {name: error for name, error in worst.items() if not error <= 1}
    if bad:
        print(f"wrong, in units of what is allowed: {bad}", file=sys.stderr)
    return 1 if bad else 0


def _error(got, wanted) -> float:
    """The largest error, over what is allowed."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if not got.is_floating_point():
        return 0.0 if got.equal(wanted) else float("inf")
    x, y = got.detach().double(), wanted.detach().double()
    allowed = RELATIVE[str(got.dtype)] * y.abs().max() + (1e-7 if y.ndim < 2 else 0)
    return float((x - y).abs().max() / allowed)


if __name__ == "__main__":
    sys.exit(main())
