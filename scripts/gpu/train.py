"""Every algorithm's demo for two updates on the device and on the CPU: python scripts/gpu/train.py

The noise has the same bits on both, so the rewards, ratios and gradients of the first rollout agree
up to the rounding of the network. Then one run is resumed, and one started by torchrun, whose
collectives are NCCL's. A line of JSON per run goes to train.jsonl in the folder that
FLOWKERN_RESULTS names. GPU_REHEARSE=1: one algorithm, on the CPU alone, begun by torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IS_REHEARSAL = os.environ.get("GPU_REHEARSE") == "1"
SECONDS = 400 if IS_REHEARSAL else 80  # of one run
STEPS = 2
SMALL = ["algorithm.group_size=4", "algorithm.prompts_per_rollout=4", "train.max_batch=32"]
SMALL += [f"algorithm.updates_per_rollout={STEPS}"]
SMALL += ["train.checkpointing_steps=1", "validation.num_prompts=2"]
SMALL += ["validation.num_inference_steps=2", "validation.steps=1000"]
PLACES = ("device",) if IS_REHEARSAL else ("device", "cpu")  # a CPU agrees with itself
FIRST = [f"train.steps={STEPS}"]
FURTHER = [f"train.steps={2 * STEPS}", "train.resume_from_checkpoint=latest"]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
# Relative to the CPU's value. Rewards go through convolutions, which CUDA does in TF32.
ALLOWED = {"reward/mean": 0.01, "grad_norm": 0.05, "ratio_mean": 1e-3}


def main() -> int:
    results = Path(os.environ.get("FLOWKERN_RESULTS") or ROOT / "build/gpu")
    results.mkdir(parents=True, exist_ok=True)
    names = sorted(path.stem for path in (ROOT / "configs/digits").glob("*.yaml"))
    names = names[:1] if IS_REHEARSAL else names
    workers = max(2, min(10, (os.cpu_count() or 4) // 2 + 2))
    good, path = True, results / "train.jsonl"
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        runs = [pool.submit(_on_both, name, Path(folder)) for name in names]
        if not IS_REHEARSAL:
            runs.append(pool.submit(_launched, names[-1], Path(folder)))
        for done in as_completed(runs):
            line = done.result()
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{line['run']}: {line.get('why', 'ok')}", flush=True)
            good &= "why" not in line
    return 0 if good else 1


def _on_both(name: str, folder: Path) -> dict:
    line, found = {"run": name}, {}
    for where in PLACES:
        out = folder / f"{name}-{where}"
        launcher = LAUNCHER if IS_REHEARSAL else ()  # a process less, and its imports
        line[f"seconds_{where}"], why = _train(name, out, where, FIRST, launcher)
        if why:
            return line | {"why": f"on the {where}: {why}"}
        found[where] = _metrics(out)
    line["differences"] = differences = _differences(found["device"], found[PLACES[-1]])
    bad = {key: value for key, value in differences.items() if not value <= ALLOWED[key]}
    if bad:
        return line | {"why": f"device and CPU differ: {bad}", "metrics": found}
    return line | _resumed(name, folder / f"{name}-device")


def _resumed(name: str, out: Path) -> dict:
    """The same run, twice as far."""
    line = {}
    line["seconds_resumed"], why = _train(name, out, "device", FURTHER)
    steps = [] if why else [row["step"] for row in _metrics(out)]
    if why or steps != list(range(1, 2 * STEPS + 1)):
        line["why"] = f"resumed: {why or steps}"
    return line


def _launched(name: str, folder: Path) -> dict:
    line = {"run": f"{name}, by torchrun"}
    line["seconds_device"], why = _train(name, folder / "launched", "device", FIRST, LAUNCHER)
    return line | ({"why": why} if why else {})


def _train(name: str, out: Path, where: str, more: list[str], launcher=()) -> tuple[float, str]:
    """Seconds, and why it failed."""
    command = [sys.executable, *launcher, "-m", "flowkern", "train", f"configs/digits/{name}.yaml"]
    env = os.environ | {"OMP_NUM_THREADS": "1" if IS_REHEARSAL else "2"}
    if where == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    begin = time.perf_counter()
    try:
        run = subprocess.run(
            [*command, f"output_dir={out}", *SMALL, *more], env=env, cwd=ROOT,
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return SECONDS, f"not done in {SECONDS} s"
    said = [line for line in run.stderr.strip().splitlines() if "it/s]" not in line]
    why = "" if run.returncode == 0 else f"exit status {run.returncode}: " + " | ".join(said[-6:])
    return round(time.perf_counter() - begin, 1), why


def _metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _differences(device: list[dict], cpu: list[dict]) -> dict[str, float]:
    """The largest relative difference of each metric that both have, over the updates."""
    found: dict[str, float] = {}
    for ours, theirs in zip(device, cpu, strict=True):
        for key in ALLOWED.keys() & ours.keys() & theirs.keys():
            error = abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-12)
            found[key] = max(found.get(key, 0.0), error)
    return found


if __name__ == "__main__":
    sys.exit(main())
