"""The agent's demo, seed by seed: success on held-out questions about another catalogue.

    python benchmarks/agent.py --seeds 3              # each from a warm-up of its own
    python benchmarks/agent.py --ablation final_turn  # one thing changed; --hard: all five kinds

Writes benchmarks/results/agent/NAME.json: every evaluation and every rollout of each seed, with its
seconds. A run that --work holds already is read, or continued, and not made again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABLATIONS = {
    "main": [],
    "final_turn": ["algorithm.turns=final"],
    "by_row": ["algorithm.group_by=row"],
    "token_mean": ["algorithm.agg=token_mean"],
    "no_kl": ["algorithm.kl_coef=0"],
    "entropy_bonus": ["algorithm.entropy_coef=0.01"],
    "kl_05": ["algorithm.kl_coef=0.05"],
    "group_32": ["algorithm.group_size=32"],
}
"""What is changed of configs/agent/demo.yaml."""
SHOWN = ("reward/mean", "entropy", "kl", "turns/mean", "turns/malformed", "zero_std_ratio")


def run(folder: Path, command: list[str], log: str) -> float:
    """The seconds that it took."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    with (folder / log).open("w") as said:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=said, stderr=said
        )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed; see {folder / log}")
    return time.perf_counter() - started


def one_seed(seed: int, name: str, options: argparse.Namespace) -> dict:
    folder = options.work / f"seed-{seed}"
    warm_up = folder / "warm-up"
    folder.mkdir(parents=True, exist_ok=True)
    if not (warm_up / "planner").is_dir():
        command = ["scripts/pretrain_planner.py", f"--seed={seed}", f"--output={warm_up}"]
        run(folder, command, "warm-up.log")
    output = folder / name
    hard = "hard-" if options.hard else ""
    overrides = {
        "output_dir": output,
        "seed": seed,
        "train.steps": options.steps,
        "train.resume_from_checkpoint": "latest",
        "model.path": warm_up / "planner",
        "data.train_prompts": warm_up / f"{hard}train.jsonl",
        "data.test_prompts": warm_up / f"{hard}test.jsonl",
        "agent.tools.search.passages": warm_up / "passages.jsonl",
    }
    if not (output / f"checkpoint-{options.steps}").is_dir():
        given = [f"{key}={value}" for key, value in overrides.items()]
        command = ["-m", "flowkern", "train", "configs/agent/demo.yaml", *given]
        run(folder, [*command, *ABLATIONS[options.ablation], *options.overrides], f"{name}.log")
    return {"seed": seed, **told(output)}


def told(output: Path) -> dict:
    metrics, validation = (
        [json.loads(line) for line in (output / file).read_text().splitlines()]
        for file in ("metrics.jsonl", "validation.jsonl")
    )
    rollouts = [one for one in metrics if "reward/mean" in one]
    return {
        "seconds_of_training": sum(one["timing_s/step"] for one in metrics),
        "evaluations": [
            {k: v for k, v in one.items() if k == "step" or k.startswith("eval/")}
            for one in validation
        ],
        "rollouts": [
            {"step": one["step"], **{key: one[key] for key in SHOWN if key in one}}
            for one in rollouts
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="so many, from --first-seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ablation", choices=ABLATIONS, default="main")
    parser.add_argument("--hard", action="store_true", help="all five kinds of questions")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/agent-benchmark")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/agent")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args()
    options.work = options.work.resolve()
    name = f"hard_{options.ablation}" if options.hard else options.ablation
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    found = [one_seed(seed, name, options) for seed in seeds]
    options.results.mkdir(parents=True, exist_ok=True)
    changed = [*ABLATIONS[options.ablation], *options.overrides]
    result = {"name": name, "changed": changed, "seeds": found}
    (options.results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for one in found:
        first, last = one["evaluations"][0], one["evaluations"][-1]
        print(f"seed {one['seed']}, {one['seconds_of_training']:.0f} s, step {last['step']}:")
        for key in sorted(k for k in last if k != "step"):
            print(f"  {key:32} {first.get(key, 0):.3f} -> {last[key]:.3f}")


if __name__ == "__main__":
    main()
