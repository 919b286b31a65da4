"""Every algorithm on the demo model: how far a budget of network calls takes each.

    python benchmarks/algorithms.py [--only NAME,...] [--seeds N] [--budget N] [--quick] [--tune]
    python benchmarks/algorithms.py --from-json PATH

Runs differ in configs/digits/<name>.yaml alone: model, prompts, adapter, optimizer and reward are
the same, and so is the budget in forward-equivalents (a call counts 1, its backward 2; the
reference and other copies count as they are called; held-out evaluation is not counted). Calls
are counted at the network. Runs go through a pool of processes of one thread each; seconds are the
processor time of such a process, which what else the machine does hardly changes. --quick is a
test: every algorithm has to raise the held-out reward by MARGIN, and the judge by JUDGED of that;
the exit status says whether all did. --tune goes on beyond the grid of learning rates until none is
best at an edge of those it tried. Writes a JSON file and a PNG chart; with --only, what the file
holds of other algorithms stays, provided that it was measured with the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from algorithm_runs import (
    BUDGET,
    COSTED,
    ENTRIES,
    EVALUATION_STEPS,
    IMAGES,
    LEARNING_RATES,
    QUICK_BUDGET,
    QUICK_IMAGES,
    TIE,
    TUNING_PROMPTS,
    TUNING_SEED,
    Job,
    Run,
    has_learned,
    iteration_costs,
    run_all,
)
from algorithm_tables import report
from harness import at_least_one, describe_machine, recorded, results_folder
from plot_algorithms import by_name


def main() -> int:
    options = _arguments()
    if options.from_json:
        result = recorded(options.from_json, "runs", "labels", "settings")
        report(result, options.from_json)
        return 0
    device = torch.device("cpu")
    result = {
        "machine": describe_machine(device),
        "commands": [" ".join(("python", *sys.argv))],
        "labels": {name: ENTRIES[name].label for name in options.only},
        "settings": {
            "budget": options.budget, "seeds": options.seeds, "processes": options.processes,
            "threads_per_process": 1, "evaluation_steps": EVALUATION_STEPS,
            "evaluation_images": QUICK_IMAGES if options.quick else IMAGES,
            "learning_rates": list(LEARNING_RATES),
            "tuning_seed": TUNING_SEED, "tuning_prompts": TUNING_PROMPTS,
        },
    }  # fmt: skip
    path = options.json or _default_path(device, result["machine"], options)
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = {name: entry.label for name, entry in ENTRIES.items()}
    kept = kept_runs(path, result, labels, options.seeds) if options.only_some else []
    begin, before = time.perf_counter(), result.pop("seconds", 0)

    def write(new: list[Run]) -> None:  # what is cut short counts
        runs = sorted([*kept, *new], key=_place)
        result.update(runs=runs, seconds=before + time.perf_counter() - begin)
        path.write_text(compact(result))

    runs = new = run_all(_jobs(options), options.processes, write)
    while options.tune and (jobs := _beyond(options, runs)):
        kept += new
        new = run_all(jobs, options.processes, write)
        runs = [*runs, *new]
    if not options.quick and not options.tune and set(COSTED) <= set(options.only):
        result["iterations"] = iteration_costs()
        path.write_text(compact(result))
    report(result, path)
    if options.tune:
        return 0
    bad = failures(runs) if options.quick else [run["name"] for run in runs if "failed" in run]
    if bad:
        print("did not learn: " + "; ".join(bad), file=sys.stderr)
    return 1 if bad else 0


def _place(run: Run) -> tuple[int, int, float]:
    """In the file, whichever run ended first."""
    return [*ENTRIES].index(run["name"]), run["seed"], run.get("learning_rate", 0.0)


def kept_runs(
    path: Path, result: dict, labels: Mapping[str, str], seeds: Sequence[int]
) -> list[Run]:
    """The runs in the file at `path`, whose table `result` then adds to, but for those of its names
    and of `seeds`. labels: of all that there is, in order.
    """
    if not path.is_file():
        return []
    old = recorded(path, "runs", "labels", "settings", "commands")
    if old["settings"] != result["settings"]:
        raise SystemExit(f"{path}: has other settings; expected {result['settings']}")
    names = set(result["labels"])
    result["labels"] = {n: own for n, own in labels.items() if n in names | set(old["labels"])}
    result["commands"] = old["commands"] + result["commands"]
    result |= {key: old[key] for key in ("seconds", "iterations") if key in old}
    return [run for run in old["runs"] if run["name"] not in names or run["seed"] not in seeds]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, separated by commas; default: all")
    parser.add_argument("--seeds", type=at_least_one, help="from 0; default 3, with --quick 2")
    parser.add_argument("--budget", type=at_least_one, help="forward-equivalents of a run")
    parser.add_argument("--processes", type=at_least_one, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="does every algorithm learn? a test")
    tune = "one seed, every learning rate, on the training prompts"
    parser.add_argument("--tune", action="store_true", help=tune)
    parser.add_argument("--from-json", type=Path, help="draw a table and a chart again")
    parser.add_argument("--json", type=Path, help="where the results go; the chart goes beside")
    options = parser.parse_args()
    if options.quick and options.tune:
        parser.error("--quick and --tune: expected one of them")
    is_short = options.quick or options.tune
    names = [n for n in ENTRIES if not (is_short and ENTRIES[n].is_variant)]
    chosen = options.only.split(",") if options.only else names
    unknown = sorted(set(chosen) - set(ENTRIES))
    if unknown:
        parser.error(f"--only: got {unknown[0]!r}, expected some of {', '.join(ENTRIES)}")
    options.only_some = options.only is not None
    options.only = [name for name in ENTRIES if name in chosen]
    options.budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)
    options.seeds = list(range(options.seeds or (2 if options.quick else 3)))
    if options.tune:
        options.seeds = [TUNING_SEED]
    return options


def _jobs(options: argparse.Namespace) -> list[Job]:
    return [
        _job(options, name, seed, rate)
        for seed in options.seeds  # what is cut short has whole seeds
        for name in options.only
        for rate in (LEARNING_RATES if options.tune else (None,))
    ]


def _job(options: argparse.Namespace, name: str, seed: int, rate: float | None) -> Job:
    """rate: None: the configuration's."""
    overrides = () if rate is None else (f"train.learning_rate={rate:g}",)
    where = {"prompts": TUNING_PROMPTS} if options.tune else {}
    return Job(name, seed, options.budget, overrides, is_quick=options.quick, **where)


def _beyond(options: argparse.Namespace, runs: list[Run]) -> list[Job]:
    """The next learning rate of each algorithm whose best is the lowest or the highest tried."""
    jobs = []
    for name, group in by_name(runs).items():
        tried, best = [run["learning_rate"] for run in group], best_rate(group)
        further = {min(tried): best / 2, max(tried): best * 2}.get(best)
        jobs += [] if further is None else [_job(options, name, TUNING_SEED, further)]
    return jobs


def best_rate(runs: Sequence[Run]) -> float:
    """Of one algorithm's runs: the lowest whose reward at the end is TIE below the highest, or
    nearer."""
    whole = [run for run in runs if "failed" not in run] or runs
    ends = [run["curve"][-1]["reward"] for run in whole]
    rates = (run["learning_rate"] for run in whole)
    return min(rate for rate, end in zip(rates, ends, strict=True) if end >= max(ends) - TIE)


def failures(runs: list[Run]) -> list[str]:
    """The runs that did not learn what --quick asks for, each with what it did instead."""
    bad = []
    for run in runs:
        what = f"{run['name']}, seed {run['seed']}"
        if "failed" in run:
            bad.append(f"{what}: {run['failed']}")
        elif not has_learned(run["curve"]):
            start, end = run["curve"][0], run["curve"][-1]
            gains = ", ".join(f"{key} {end[key] - start[key]:+.3f}" for key in ("reward", "judge"))
            bad.append(f"{what}: {gains}")
    return bad


def _default_path(device: torch.device, machine: dict, options: argparse.Namespace) -> Path:
    suffix = "-quick" if options.quick else "-tuning" if options.tune else ""
    folder = results_folder(device, machine)
    return folder / f"algorithms{suffix}.json"


def compact(result: dict) -> str:
    """JSON with a line per point of a curve and per trace."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[^][{}]*\]|\{[^][{}]*\}", lambda m: " ".join(m[0].split()), text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
