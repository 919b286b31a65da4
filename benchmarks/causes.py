"""Experiments on the demo model, each of which could refute what is said to cause something.

    python benchmarks/causes.py --table NAME [--only NAME,...] [--seeds N] [--budget N]
    python benchmarks/causes.py --from-json PATH

A table of experiments is a module, <name>_table.py: runs of benchmarks/algorithms.py that differ in
the options named, or, where no option says it, in a change that the module makes to the trainer.
Model, prompts, counting and evaluation are that benchmark's, with fewer images. The JSON is written
as each run ends; what the file holds of other experiments and seeds stays, provided that it was
measured with the same settings.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean

import torch
from algorithm_runs import ENTRIES, EVALUATION_STEPS, Entry, Job, Run, run_all
from algorithms import compact, kept_runs
from harness import at_least_one, describe_machine, recorded, results_folder
from plot_algorithms import by_name, mean_to_reach
from rich.console import Console
from rich.table import Table

TABLES = ("causes", "solver", "speed_ups")
IMAGES, BUDGET = 120, 40_000
LEVEL = 0.75
Change = Callable[..., Callable[[], dict[str, float]] | None]
"""Of a trainer, before its first step; see `Job.change`."""


@dataclass(frozen=True)
class Experiment:
    """A line of a table."""

    label: str
    entry: str
    """Of ENTRIES, which it is a variant of."""
    overrides: tuple[str, ...] = ()
    change: Change | None = None
    share: float = 1.0
    """Of the budget: more where an iteration costs more, so that as many of them fit."""
    until: tuple[tuple[str, float], ...] = ()
    """Scores and levels: a run ends with the evaluation that passes all of them."""


def experiments(table: str) -> Mapping[str, Experiment]:
    return import_module(f"{table}_table").EXPERIMENTS


def images(table: str) -> int:
    """Of an evaluation."""
    return getattr(import_module(f"{table}_table"), "IMAGES", IMAGES)


@dataclass(frozen=True)
class Trial(Job):
    """A run of an experiment."""

    table: str = TABLES[0]

    @property
    def experiment(self) -> Experiment:
        return experiments(self.table)[self.name]

    @property
    def entry(self) -> Entry:
        return ENTRIES[self.experiment.entry]

    @property
    def images(self) -> int:
        return images(self.table)

    def is_over(self, curve: list[dict[str, float]]) -> bool:
        until = self.experiment.until
        return bool(until) and all(curve[-1][key] >= level for key, level in until)

    def change(self, trainer) -> Callable[[], dict[str, float]]:
        change = self.experiment.change
        return (change and change(trainer)) or dict


def main() -> int:
    options = _arguments()
    if options.from_json:
        result = recorded(options.from_json, "runs", "labels", "seconds")
        tell(options.table, result, options.from_json)
        return 0
    known, device = experiments(options.table), torch.device("cpu")
    labels = {name: experiment.label for name, experiment in known.items()}
    result = {
        "machine": describe_machine(device),
        "commands": [" ".join(("python", *sys.argv))],
        "labels": {name: labels[name] for name in options.only},
        "settings": {
            "budget": options.budget, "threads_per_process": 1,
            "evaluation_steps": EVALUATION_STEPS, "evaluation_images": images(options.table),
        },
    }  # fmt: skip
    path = options.json or results_folder(device, result["machine"]) / f"{options.table}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = kept_runs(path, result, labels, options.seeds)
    begin, before = time.perf_counter(), result.pop("seconds", 0)

    def write(new: list[Run]) -> None:  # what is cut short counts
        runs = sorted([*kept, *new], key=lambda run: ([*known].index(run["name"]), run["seed"]))
        result.update(runs=runs, seconds=before + time.perf_counter() - begin)
        path.write_text(compact(result))

    jobs = [
        Trial(name, seed, round(options.budget * known[name].share), known[name].overrides,
              table=options.table)
        for seed in options.seeds  # what is cut short has whole seeds
        for name in options.only
    ]  # fmt: skip
    run_all(jobs, options.processes, write)
    tell(options.table, result, path)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TABLES, default=TABLES[0])
    parser.add_argument("--only", help="names, separated by commas; default: all")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="how many, from --first-seed")
    parser.add_argument("--first-seed", type=int, default=0)
    budget = "forward-equivalents of a run"
    parser.add_argument("--budget", type=at_least_one, default=BUDGET, help=budget)
    parser.add_argument("--processes", type=at_least_one, default=1)
    parser.add_argument("--from-json", type=Path, help="print a table again")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    known = experiments(options.table)
    chosen = options.only.split(",") if options.only else known
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"--only: got {unknown[0]!r}, expected some of {', '.join(known)}")
    options.only = [name for name in known if name in chosen]
    options.seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    return options


# ---- what the runs say ----


def tell(table: str, result: dict, path: Path) -> None:
    """By the table's own report, where it has one."""
    getattr(import_module(f"{table}_table"), "report", report)(result, path)


def fall(run: Run) -> float:
    """The farthest that a run was below its best evaluation until then."""
    rewards = [point["reward"] for point in run["curve"]]
    return max(max(rewards[: i + 1]) - reward for i, reward in enumerate(rewards))


def report(result: dict, path: Path) -> None:
    """A line per experiment; means over seeds, with the range of the reward at the end."""
    columns = (
        "", "seeds", "end reward", "range", "best", "fall", "worst fall", "judge", "distance",
        f"to {LEVEL:.2f}", "iterations", "s",
    )  # fmt: skip
    table = Table(title="Held-out prompts: means over seeds")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for name, runs in by_name(result["runs"]).items():
        table.add_row(result["labels"][name], *_row(runs))
    Console(width=None if sys.stdout.isatty() else 170).print(table)
    for run in result["runs"]:
        if "failed" in run:
            print(f"{run['name']}, seed {run['seed']}: {run['failed']}", file=sys.stderr)
    print(f"{result['seconds']:.0f} s; {path}")


def _row(runs: list[Run]) -> tuple[str, ...]:
    ends, falls = [run["curve"][-1] for run in runs], [fall(run) for run in runs]
    end = {key: mean(point[key] for point in ends) for key in ends[0]}
    rewards, taken = [point["reward"] for point in ends], mean_to_reach(runs, LEVEL)
    best = mean(max(point["reward"] for point in run["curve"]) for run in runs)
    passed = sum(mean_to_reach([run], LEVEL) is not None for run in runs)
    return (
        f"{len(runs)}", f"{end['reward']:.3f}", f"{min(rewards):.3f} to {max(rewards):.3f}",
        f"{best:.3f}", f"{mean(falls):.3f}", f"{max(falls):.3f}", f"{end['judge']:.3f}",
        f"{end['distance']:.2f}", f"{passed} of {len(runs)}" if taken is None else
        f"{taken / 1000:.0f}k", f"{end['iterations']:.0f}", f"{end['seconds']:.0f}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
