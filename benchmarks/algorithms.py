"""Every algorithm on the demo model: how far a budget of network calls takes each.

    python benchmarks/algorithms.py [--only NAME,...] [--seeds N] [--budget N] [--quick] [--tune]
    python benchmarks/algorithms.py --from-json PATH

Runs differ in configs/digits/<name>.yaml alone: model, prompts, adapter, optimizer and reward are
the same, and so is the budget in forward-equivalents (a row forward counts 1, its backward 2; the
reference and other copies count as they are called; held-out evaluation is not counted). Rows are
counted at the network. Runs go through a pool of processes of one thread each; seconds are the
processor time of such a process, which what else the machine does hardly changes. --quick is a
test: every algorithm has to raise the held-out reward by MARGIN, and the judge by JUDGED of that;
the exit status says whether all did. Writes a JSON file and a PNG chart; with --only, what the file
holds of other algorithms stays, provided that it was measured with the same settings.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from harness import ROOT, describe_machine, device_slug
from plot_algorithms import LEVELS, by_name, common_level, mean_to_reach, plot
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """A line of the table: a configuration, and what differs from it."""

    label: str
    config: str
    overrides: tuple[str, ...] = ()
    is_variant: bool = False
    """Not one that --quick asks to learn."""


CONFIGS = ROOT / "configs" / "digits"
TUNED = ("train.learning_rate=6e-3",)  # for this budget; the configuration's is for a longer run
PAPERS_SETTING = ("algorithm.guidance_scale=2.0", "algorithm.kl_coef=0.004")
ENTRIES = {
    "flow_grpo": Entry("Flow-GRPO", "flow_grpo", TUNED),
    "flow_grpo_guided": Entry(
        "Flow-GRPO, guidance and KL", "flow_grpo", (*TUNED, *PAPERS_SETTING), is_variant=True
    ),
    "flow_grpo_fast": Entry("Flow-GRPO-Fast", "flow_grpo_fast"),
    "grpo_guard": Entry("GRPO-Guard", "grpo_guard"),
    "dance_grpo": Entry("DanceGRPO", "dance_grpo"),
    "mix_grpo": Entry("MixGRPO", "mix_grpo"),
    "mix_grpo_flash": Entry("MixGRPO-Flash", "mix_grpo_flash"),
    "mix_grpo_flash_star": Entry("MixGRPO-Flash*", "mix_grpo_flash_star"),
    "temp_flow_grpo": Entry("TempFlow-GRPO", "temp_flow_grpo"),
    "g2rpo": Entry("G2RPO", "g2rpo"),
    "awm": Entry("AWM", "awm"),
    "diffusion_nft": Entry("DiffusionNFT", "diffusion_nft"),
}
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
TUNING_SEED = 1000  # never one of those that are reported
BUDGET, QUICK_BUDGET = 100_000, 100_000
IMAGES, EVALUATION_STEPS, EVALUATION_SEED = 240, 10, 2**40
POINTS = 8  # of a curve, beside its start
MARGIN, JUDGED = 0.15, 0.8
Row = dict


@dataclass(frozen=True)
class Job:
    """One training run, for a process of the pool."""

    name: str
    seed: int
    budget: int
    overrides: tuple[str, ...] = ()
    points: int = POINTS
    is_quick: bool = False
    """Stop as soon as an evaluation passes what --quick asks for."""

    def run(self) -> Row:
        """The run as a row of the JSON; what stopped it early, if anything, is in "failed"."""
        trainer = _trainer(self)
        counter = Counter(trainer)
        curve = [counter.now | evaluate(trainer)]
        traces: list[dict[str, float]] = []
        failed = None
        while counter.total < self.budget:
            try:
                records, seconds = timed(trainer.step)
            except FloatingPointError as error:
                failed = str(error)
                break
            counter.add(records, seconds)
            traces.append(_trace(records))
            if counter.total >= min(len(curve) * self.budget / self.points, self.budget):
                curve.append(counter.now | evaluate(trainer))
                if self.is_quick and has_learned(curve):
                    break
        recipe, steps = trainer.recipe, trainer.global_step
        return {
            "name": self.name, "seed": self.seed, "overrides": list(self.overrides),
            "learning_rate": trainer.config.train.learning_rate,
            "images_per_iteration": recipe.prompts_per_rollout * int(counter.images),
            "optimizer_steps": steps, "curve": curve, "traces": _columns(traces),
            **({} if failed is None else {"failed": failed}),
        }  # fmt: skip


class Counter:
    """What a run has taken so far."""

    def __init__(self, trainer) -> None:
        self.now = dict.fromkeys(("iterations", "sample", "train_forward", "train_gradient"), 0)
        self.now |= {"forward_equivalents": 0, "seconds": 0.0}
        self.images = 0
        self._plan_images = lambda: len(trainer.recipe.plan(trainer.model.sigmas).leaves)
        self._with_gradient = 0
        trainer.network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, args, kwargs) -> None:
        """Rows that will go backward; all rows are in the trainer's metrics."""
        self._with_gradient += len(kwargs["hidden_states"]) if torch.is_grad_enabled() else 0

    @property
    def total(self) -> int:
        return self.now["forward_equivalents"]

    def add(self, records: Sequence[dict[str, float]], seconds: float) -> None:
        """An iteration's metrics."""
        self.images = self.images or self._plan_images()
        now, rows = dict(self.now), sum(record["nfe/train"] for record in records)
        now["iterations"] += 1
        now["sample"] += records[0]["nfe/sample"]
        now["train_gradient"] = self._with_gradient
        now["train_forward"] += rows
        now["forward_equivalents"] = now["sample"] + now["train_forward"] + 2 * self._with_gradient
        now["seconds"] += seconds
        self.now = now


def has_learned(curve: list[dict[str, float]]) -> bool:
    """Has the reward risen by MARGIN, and the judge by JUDGED of that gain?"""
    reward, judge = (curve[-1][key] - curve[0][key] for key in ("reward", "judge"))
    return reward >= MARGIN and judge >= JUDGED * reward


def timed(call: Callable):
    """What a call returns, and the processor seconds it took."""
    begin = time.process_time()
    return call(), time.process_time() - begin


def _trainer(job: Job):
    """The trainer of a job; it writes no files unless it is `run`."""
    from flowkern.train.config import load_config
    from flowkern.train.trainer import Trainer

    torch.set_num_threads(1)
    entry = ENTRIES[job.name]
    os.chdir(ROOT)  # the configurations' paths are relative to it
    config = load_config(
        CONFIGS / f"{entry.config}.yaml", [*entry.overrides, *job.overrides, f"seed={job.seed}"]
    )
    return Trainer(config)


def evaluate(trainer) -> dict[str, float]:
    """Held-out prompts from the same noise every time, without randomness and guidance."""
    found = _scores(trainer, 1.0)
    guidance = trainer.recipe.guidance_scale
    if guidance != 1:  # what the algorithm samples with
        found |= {f"guided_{name}": v for name, v in _scores(trainer, guidance).items()}
    return found


def _scores(trainer, guidance_scale: float) -> dict[str, float]:
    from flowkern.rollout import prompt_ids
    from flowkern.train.prompts import read_prompts
    from flowkern.train.validation import RESERVED_ITERATION, evaluate, sample_images

    rows = read_prompts(trainer.config.data.test_prompts)
    rows = [rows[i % len(rows)] for i in range(IMAGES)]
    trainer.model.network = trainer.network
    images = sample_images(
        trainer.model,
        [row["prompt"] for row in rows],
        prompt_ids(RESERVED_ITERATION, torch.arange(IMAGES)),
        seed=EVALUATION_SEED,
        num_inference_steps=EVALUATION_STEPS,
        guidance_scale=guidance_scale,
        max_batch=IMAGES,
    )
    found = evaluate(trainer.rewards, images, rows)
    names = {"reward": "digits_classifier", "judge": "digits_judge", "distance": "distance_to_real"}
    return {name: round(found[key].mean().item(), 5) for name, key in names.items()}


TRACED = ("ratio_mean", "pg_clipfrac_higher", "pg_clipfrac_lower", "kl", "grad_norm")


def _trace(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """An iteration in a few numbers: means over its optimizer steps."""
    first = records[0]
    trace = {"rollout_reward": first["reward/mean"], "zero_std_ratio": first["zero_std_ratio"]}
    trace |= {name: mean(record[name] for record in records) for name in TRACED}
    return {name: float(f"{value:.5g}") for name, value in trace.items()}


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


# ---- what an iteration costs ----

COST_OVERRIDES = ("algorithm.num_inference_steps=25",)
COSTED = ("dance_grpo", "mix_grpo", "mix_grpo_flash", "mix_grpo_flash_star")
COST_ROUNDS = 3
COST_ROLLOUTS = range(60)  # at the demo's pace the windows move as far as in the papers' 300


def iteration_costs() -> list[Row]:
    """The algorithms of the cost claims at the papers' 25 steps, equal images, in turns.

    Seconds are of the first iterations, where the window is at its start; forward-equivalents are
    means over a whole run, by counting the plans.
    """
    from flowkern.rl.algorithms import mean_cost

    _quiet()
    trainers = {name: _trainer(Job(name, TUNING_SEED, 0, COST_OVERRIDES)) for name in COSTED}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for i in range(1 + COST_ROUNDS):
        for name, trainer in trainers.items():
            taken = timed(trainer.step)[1]
            if i:  # the first warms up
                seconds[name].append(taken)
    rows = []
    for name, trainer in trainers.items():
        recipe = trainer.recipe
        prompts, forwards = recipe.prompts_per_rollout, trainer.objective.forwards
        first, whole = (
            mean_cost(recipe, trainer.model.sigmas, r)[0] for r in (range(1), COST_ROLLOUTS)
        )
        counts = [prompts * (c.sample + (forwards + 2) * c.train) for c in (first, whole)]
        rows.append({
            "name": name, "images": prompts * whole.images, "seconds": median(seconds[name]),
            "forward_equivalents_first": counts[0], "forward_equivalents_run": counts[1],
            "rollouts": len(COST_ROLLOUTS),
        })  # fmt: skip
    return rows


# ---- many runs ----


def run_all(
    jobs: Sequence[Job], processes: int, each: Callable[[list[Row]], None] = lambda rows: None
) -> list[Row]:
    """Every job; as one ends, a line is printed and `each` gets the rows so far."""
    done: dict[Job, Row] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_quiet) as pool:
        futures = {pool.submit(job.run): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                row = future.result()
            except Exception as error:  # one that cannot run is a row that says so
                row = {"name": job.name, "seed": job.seed, "overrides": list(job.overrides)}
                row |= {"curve": [], "failed": f"{type(error).__name__}: {error}"}
            done[job] = row
            print(_line(row, f"{len(done)} of {len(jobs)}"), file=sys.stderr, flush=True)
            each([done[job] for job in jobs if job in done])
    return [done[job] for job in jobs]


def _quiet() -> None:
    """In a process of the pool: one thread, no progress bars."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from diffusers.utils import logging

    logging.disable_progress_bar()


def _line(row: Row, count: str) -> str:
    what = " ".join((row["name"], f"seed {row['seed']}", *row["overrides"]))
    if not row["curve"]:
        return f"  {count}: {what}: {row['failed']}"
    start, end = row["curve"][0], row["curve"][-1]
    found = ", ".join(
        f"{key} {start[key]:.3f} to {end[key]:.3f}" for key in ("reward", "judge", "distance")
    )
    best = max(point["reward"] for point in row["curve"])
    failed = f"; {row['failed']}" if "failed" in row else ""
    return (
        f"  {count}: {what}: {found} (best reward {best:.3f}); {end['iterations']} iterations, "
        f"{end['forward_equivalents'] / 1000:.0f}k, {end['seconds']:.0f} s{failed}"
    )


# ---- the command ----


def main() -> int:
    options = _arguments()
    if options.from_json:
        result = json.loads(options.from_json.read_text())
        _report(result, options.from_json)
        return 0
    device = torch.device("cpu")
    result = {
        "machine": describe_machine(device),
        "commands": [" ".join(("python", *sys.argv))],
        "labels": {name: ENTRIES[name].label for name in options.only},
        "settings": {
            "budget": options.budget, "seeds": options.seeds, "processes": options.processes,
            "threads_per_process": 1, "evaluation_images": IMAGES,
            "evaluation_steps": EVALUATION_STEPS, "learning_rates": list(LEARNING_RATES),
            "tuning_seed": TUNING_SEED,
        },
    }  # fmt: skip
    path = options.json or _default_path(device, result["machine"], options)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _kept(path, result) if options.only_some else []
    begin, before = time.perf_counter(), result.pop("seconds", 0)

    def write(rows: list[Row]) -> None:  # what is cut short counts
        runs = sorted([*kept, *rows], key=lambda row: [*ENTRIES].index(row["name"]))
        result.update(runs=runs, seconds=before + time.perf_counter() - begin)
        path.write_text(_compact(result))

    rows = run_all(_jobs(options), options.processes, write)
    if not options.quick and not options.tune and set(COSTED) <= set(options.only):
        result["iterations"] = iteration_costs()
        path.write_text(_compact(result))
    _report(result, path)
    if options.tune:
        return 0
    bad = failures(rows) if options.quick else [row["name"] for row in rows if "failed" in row]
    if bad:
        print("did not learn: " + "; ".join(bad), file=sys.stderr)
    return 1 if bad else 0


def _kept(path: Path, result: dict) -> list[Row]:
    """The runs of other algorithms in the file at `path`, whose table `result` then adds to."""
    if not path.is_file():
        return []
    old = json.loads(path.read_text())
    if old["settings"] != result["settings"]:
        raise SystemExit(f"{path}: has other settings; expected {result['settings']}")
    names = set(result["labels"])
    result["labels"] = {n: e.label for n, e in ENTRIES.items() if n in names | set(old["labels"])}
    result["commands"] = old["commands"] + result["commands"]
    result |= {key: old[key] for key in ("seconds", "iterations") if key in old}
    return [row for row in old["runs"] if row["name"] not in names]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, help="how many, from 0; default 3, with --quick 2")
    parser.add_argument("--budget", type=int, help="forward-equivalents of a run")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="does every algorithm learn? a test")
    parser.add_argument("--tune", action="store_true", help="one seed, every learning rate")
    parser.add_argument("--from-json", type=Path, help="draw a table and a chart again")
    parser.add_argument("--json", type=Path, help="where the results go; the chart goes beside")
    options = parser.parse_args()
    if options.quick and options.tune:
        parser.error("--quick and --tune: expected one of them")
    names = [n for n in ENTRIES if not (options.quick and ENTRIES[n].is_variant)]
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
    rates = [(f"train.learning_rate={rate}",) for rate in LEARNING_RATES] if options.tune else [()]
    return [
        Job(name, seed, options.budget, rate, is_quick=options.quick)
        for seed in options.seeds  # what is cut short has whole seeds
        for name in options.only
        for rate in rates
    ]


def failures(rows: list[Row]) -> list[str]:
    """The runs that did not learn what --quick asks for, each with what it did instead."""
    bad = []
    for row in rows:
        what = f"{row['name']}, seed {row['seed']}"
        if "failed" in row:
            bad.append(f"{what}: {row['failed']}")
        elif not has_learned(row["curve"]):
            start, end = row["curve"][0], row["curve"][-1]
            gains = ", ".join(f"{key} {end[key] - start[key]:+.3f}" for key in ("reward", "judge"))
            bad.append(f"{what}: {gains}")
    return bad


def _default_path(device: torch.device, machine: dict, options: argparse.Namespace) -> Path:
    suffix = "-quick" if options.quick else "-tuning" if options.tune else ""
    folder = ROOT / "benchmarks" / "results" / device_slug(device, machine)
    return folder / f"algorithms{suffix}.json"


def _compact(result: dict) -> str:
    """JSON with a line per point of a curve and per trace."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[^][{}]*\]|\{[^][{}]*\}", lambda m: " ".join(m[0].split()), text) + "\n"


# ---- the tables ----


def _report(result: dict, path: Path) -> None:
    machine, settings = result["machine"], result["settings"]
    print(
        f"flowkern {machine['flowkern']} at {machine['commit']}"
        f"{' (modified)' if machine['dirty'] else ''} on {machine['processor']}, "
        f"{settings['processes']} processes of one thread; torch {machine['torch']}, "
        f"{machine['utc']} UTC"
    )
    console = Console(width=None if sys.stdout.isatty() else 140)
    runs = by_name(result["runs"])
    if len({tuple(row["overrides"]) for row in result["runs"]}) > 1:  # --tune: a line per run
        runs = {" ".join((r["name"], *r["overrides"])): [r] for r in result["runs"] if r["curve"]}
    runs = {result["labels"].get(name, name): rows for name, rows in runs.items()}
    console.print(_score_table(runs))
    console.print(_count_table(runs))
    if result.get("iterations"):
        console.print(_cost_table(result))
    if rows := claims(result):
        console.print(_table("", ("the paper's claim", "measured here", "why"), rows, lines=True))
    plot(result, path.with_suffix(".png"))
    print(f"{result['seconds']:.0f} s; {path} and {path.with_suffix('.png').name}")


def _table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: bool = False
) -> Table:
    table = Table(title=title or None, show_lines=lines)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if lines or i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _score_table(runs: dict[str, list[Row]]) -> Table:
    """What was reached."""
    out = []
    for name, rows in runs.items():
        start, end = rows[0]["curve"][0], _end(rows)
        rewards = [row["curve"][-1]["reward"] for row in rows]
        out.append((
            name,
            *(f"{start[key]:.2f} to {end[key]:.3f}" for key in ("reward", "judge", "distance")),
            f"{min(rewards):.3f} to {max(rewards):.3f}",
            *(_reached(rows, level) for level in (0.7, 0.8)),
        ))  # fmt: skip
    columns = ("", "reward", "judge", "distance", "reward by seed", "to .70", "to .80")
    title = "Held-out prompts: means over seeds; to a reward: forward-equivalents, processor time"
    return _table(title, columns, out)


def _count_table(runs: dict[str, list[Row]]) -> Table:
    """What it took."""
    out = []
    for name, rows in runs.items():
        end, images = _end(rows), mean(row["images_per_iteration"] for row in rows)
        kinds = ("sample", "train_forward", "train_gradient", "forward_equivalents")
        out.append((
            name, f"{rows[0]['learning_rate']:g}", f"{images:.0f}", f"{end['iterations']:.0f}",
            f"{mean(row['optimizer_steps'] for row in rows):.0f}",
            *(f"{end[key] / 1000:.1f}k" for key in kinds), f"{end['seconds']:.0f}",
        ))  # fmt: skip
    columns = (
        "", "learning rate", "images", "iterations", "updates", "rows sampled", "rows trained",
        "with gradient", "forward-equivalents", "s",
    )  # fmt: skip
    return _table("Of a run: images of an iteration, and what was called in all", columns, out)


def _end(rows: list[Row]) -> dict[str, float]:
    """The means of the last points of the curves."""
    ends = [row["curve"][-1] for row in rows]
    return {key: mean(point[key] for point in ends) for key in ends[0]}


def _reached(rows: list[Row], level: float) -> str:
    taken = mean_to_reach(rows, level)
    if taken is None:
        count = sum(mean_to_reach([row], level) is not None for row in rows)
        return f"{count} of {len(rows)}"
    return f"{taken / 1000:.0f}k, {mean_to_reach(rows, level, 'seconds'):.0f} s"


def _cost_table(result: dict) -> Table:
    """An iteration at 25 steps, beside DanceGRPO's."""
    first, out = result["iterations"][0], []
    for row in result["iterations"]:
        count, seconds = row["forward_equivalents_run"], row["seconds"]
        out.append((
            result["labels"].get(row["name"], row["name"]), f"{row['images']:.0f}",
            f"{count:.0f} ({count / first['forward_equivalents_run']:.0%})",
            f"{seconds:.2f} ({seconds / first['seconds']:.0%})",
        ))  # fmt: skip
    columns = ("", "images", "forward-equivalents, mean of a run", "s, first iterations")
    return _table("An iteration of 25 steps", columns, out)


def claims(result: dict) -> list[tuple[str, str, str]]:
    """The papers' headline claims, what the runs say, and why; none where runs are missing."""
    runs, rows = by_name(result["runs"]), []
    cost = {row["name"]: row for row in result.get("iterations", [])}

    def faster(claim: str, first: str, second: str, why: str) -> None:
        if {first, second} <= set(runs):
            rows.append((claim, _faster(runs[first], runs[second]), why))

    def cheaper(claim: str, name: str, why: str) -> None:
        if name in cost:
            first, other = cost["dance_grpo"], cost[name]
            count, seconds = (
                1 - other[key] / first[key] for key in ("forward_equivalents_run", "seconds")
            )
            rows.append((claim, f"{count:.0%} less by count, {seconds:.0%} less time", why))

    faster(
        "AWM: Flow-GRPO's reward 8 times (GenEval) to 24 times (OCR) as fast",
        "awm", "flow_grpo",
        "without guidance and KL an image costs both the same, 38 and 37 forward-equivalents: what "
        "is left is what a gradient teaches",
    )  # fmt: skip
    faster(
        "the same against Flow-GRPO in its paper's setting, guidance and KL",
        "awm", "flow_grpo_guided",
        "guidance and KL cost 74 forward-equivalents per image (released loops: 92 against 44); "
        "and with guidance the demo has little left to learn",
    )  # fmt: skip
    if "flow_grpo_guided" in runs:
        start, end = runs["flow_grpo_guided"][0]["curve"][0], _end(runs["flow_grpo_guided"])
        rows.append((
            "", " ".join(
                f"{name} {start[key]:.3f} to {end[key]:.3f}{stop}" for name, key, stop in (
                    ("guided: reward", "guided_reward", ";"), ("unguided:", "reward", "")
                )
            ),
            "guided with the empty prompt, which it never saw but draws digits of all kinds from, "
            "the demo begins near its ceiling; the adapter learns to be good with guidance",
        ))  # fmt: skip
    cheaper(
        "MixGRPO trains in about 50 % less time than DanceGRPO",
        "mix_grpo", "4 steps of 25 are trained instead of 14",
    )  # fmt: skip
    cheaper(
        "MixGRPO-Flash in 71 % less",
        "mix_grpo_flash", "and fewer steps follow the window, which moves on and leaves fewer",
    )  # fmt: skip
    cheaper("", "mix_grpo_flash_star", "Flash*: fewer still, and the window stays")
    faster(
        "TempFlow-GRPO: Flow-GRPO's reward at a tenth of the GPU hours",
        "temp_flow_grpo", "flow_grpo",
        "every reward is credited to the one step that was drawn, and siblings share a row in "
        "training; a rollout's images have more in common",
    )  # fmt: skip
    if {"g2rpo", "mix_grpo"} <= set(runs):
        ends = [[row["curve"][-1]["reward"] for row in runs[n]] for n in ("g2rpo", "mix_grpo")]
        rows.append((
            "G2RPO ends at a higher reward than MixGRPO",
            f"{mean(ends[0]):.3f} against {mean(ends[1]):.3f} at an equal budget",
            "the paper compares equal iterations, of which G2RPO's costs about 4 times as much",
        ))  # fmt: skip
    return rows


def _faster(rows: list[Row], others: list[Row]) -> str:
    """How much less `rows` took than `others` to the highest reward that all of them pass."""
    level = common_level(rows, others)
    if level is None:
        return f"they share no level of reward from {LEVELS[0]} on"
    keys = ("forward_equivalents", "seconds")
    taken, other = ([mean_to_reach(r, level, key) for key in keys] for r in (rows, others))
    return (
        f"to {level:.2f}: {other[0] / taken[0]:.1f} times by count ({taken[0] / 1000:.0f}k against "
        f"{other[0] / 1000:.0f}k), {other[1] / taken[1]:.1f} times in seconds"
    )


if __name__ == "__main__":
    sys.exit(main())
