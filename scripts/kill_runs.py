"""Kills a run of two processes at random moments: python scripts/kill_runs.py --moments 10

A tiny run of the digits is made once without a kill. Then, for each moment, anew: both processes
are killed (kill -9) there, or one of them and a moment later the other; every checkpoint that has
its name is looked through; the run goes on with resume_from_checkpoint=latest to its end, and what
it leaves is compared with the first run, bit for bit: weights, their mean, moments, metrics,
validations. Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLOCK = ("timing_s/", "throughput/", "memory/")
OPTIONS = (
    "algorithm.group_size=4", "algorithm.prompts_per_rollout=4", "algorithm.num_inference_steps=3",
    "algorithm.updates_per_rollout=2", "train.steps=8", "train.checkpointing_steps=2",
    "train.checkpoints_total_limit=2", "train.max_batch=16", "train.ema_decay=0.9",
    "validation.num_prompts=4", "validation.num_inference_steps=2", "validation.steps=4",
)  # fmt: skip
PROCESSES = 2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    preload()
    chance, found = random.Random(options.seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        began = time.monotonic()
        if run(place / "whole") != [0] * PROCESSES:
            print((place / "whole.log").read_text()[-2000:], file=sys.stderr)
            return 1
        took = time.monotonic() - began
        print(f"a run takes {took:.1f} s", flush=True)
        for number in range(options.moments):
            moment, mode = chance.uniform(0, took), chance.choice(["all", "first", "second"])
            said = trial(place, f"run-{number}", moment, mode, found)
            print(f"{number}: {mode} at {moment:.2f} s: {said}", flush=True)
    print(json.dumps({"moments": options.moments, "run_s": round(took, 1), **found}))
    return 1 if found["differs"] or found["broken"] or found["failed"] else 0


def preload() -> None:
    """What a run imports, once: processes are forked from here."""
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import flowkern.models.sd3
    import flowkern.train.flow
    import flowkern.train.loop  # noqa: F401


def trial(place: Path, name: str, moment: float, mode: str, found: Counter) -> str:
    """Killed, looked through, taken to its end, compared."""
    from flowkern.train import checkpoint

    directory = place / name
    status = run(directory, kill_after=moment, mode=mode)
    found["ended before"] += status == [0] * PROCESSES
    there = checkpoint.checkpoints(directory)
    if faults := [fault for path in there if (fault := checkpoint.broken(path))]:
        found["broken"] += 1
        return f"broken: {faults[0]}"
    found[f"newest {checkpoint.step_of(there[-1])}" if there else "none yet"] += 1
    if run(directory) != [0] * PROCESSES:
        found["failed"] += 1
        return (place / f"{name}.log").read_text()[-1500:]
    if differs := difference(place / "whole", directory):
        found["differs"] += 1
        return f"differs: {differs}"
    found["equal"] += 1
    return f"{len(there)} checkpoints, all whole; resumed, equal"


def run(directory: Path, kill_after: float | None = None, mode: str = "all") -> list[int]:
    """The exit statuses of a run's processes; of a killed one -9."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES, "MASTER_PORT": port}
    shared["MASTER_ADDR"] = "127.0.0.1"
    children = [fork(directory, {**shared, "RANK": r, "LOCAL_RANK": r}) for r in range(PROCESSES)]
    if kill_after is not None:
        time.sleep(kill_after)
        order = children if mode in ("all", "first") else children[::-1]
        for i, child in enumerate(order):
            if i and mode != "all":
                time.sleep(0.3)  # it goes on alone, and waits
            os.kill(child, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def fork(directory: Path, environment: dict[str, object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(
            directory.with_name(directory.name + ".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ |= {key: str(value) for key, value in environment.items()}
        signal.alarm(600)
        from flowkern.cli import main as command

        status = command([
            "train", str(ROOT / "configs/digits/flow_grpo.yaml"), *OPTIONS,
            f"output_dir={directory}", "train.resume_from_checkpoint=latest",
        ])  # fmt: skip
    finally:
        sys.stderr.flush()
        os._exit(status)


# ---- comparing ----


def difference(one: Path, two: Path) -> str | None:
    """What of two runs is not the same; None: nothing."""
    import torch
    from safetensors.torch import load_file

    for name in ("metrics.jsonl", "validation.jsonl"):
        if records(one / name) != records(two / name):
            return name
    names = [sorted(path.name for path in run.glob("checkpoint-*")) for run in (one, two)]
    if names[0] != names[1]:
        return f"checkpoints {names}"
    for name in names[0]:
        for file in ("adapter_model.safetensors", "ema/adapter_model.safetensors"):
            mine, theirs = (load_file(run / name / file) for run in (one, two))
            if mine.keys() != theirs.keys() or not all(
                torch.equal(mine[k], theirs[k]) for k in mine
            ):
                return f"{name}/{file}"
        states = [torch.load(run / name / "state.pt", weights_only=True) for run in (one, two)]
        if not same(*states):
            return f"{name}/state.pt"
    return None


def same(one: object, two: object) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def records(path: Path) -> list[dict]:
    """Without what a clock or the machine decides."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in one.items() if not k.startswith(CLOCK)} for one in found]


if __name__ == "__main__":
    raise SystemExit(main())
