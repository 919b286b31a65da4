"""Training runs of the algorithms on the demo model, with every network call counted."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import ROOT


@dataclass(frozen=True)
class Entry:
    """A line of the table: a configuration, and what differs from it."""

    label: str
    config: str
    overrides: tuple[str, ...] = ()
    is_variant: bool = False
    """Not one that --quick asks to learn."""
    teacher: str | None = None
    """The entry whose weights it learns from, after a run of `TEACHER_SEED` with the same budget:
    that run is not counted in its own."""


CONFIGS = ROOT / "configs" / "digits"
TUNED = ("train.learning_rate=6e-3",)  # for this budget; the configurations' are for longer runs
PAPERS_SETTING = ("algorithm.guidance_scale=2.0", "algorithm.kl_coef=0.004")
ENTRIES = {
    "flow_grpo": Entry("Flow-GRPO", "flow_grpo", TUNED),
    "flow_grpo_guided": Entry(
        "Flow-GRPO, guidance and KL", "flow_grpo", (*TUNED, *PAPERS_SETTING), is_variant=True
    ),
    "flow_grpo_both_halves": Entry(
        "Flow-GRPO, guidance and KL, both halves learn",
        "flow_grpo",
        (*TUNED, *PAPERS_SETTING, "algorithm.uncond_gradient=true"),
        is_variant=True,
    ),
    "gardo": Entry("GARDO", "gardo", TUNED),
    "flash_grpo": Entry("Flash-GRPO", "flash_grpo"),
    "flow_dppo": Entry("Flow-DPPO", "flow_dppo"),
    "flow_grpo_fast": Entry("Flow-GRPO-Fast", "flow_grpo_fast"),
    "grpo_guard": Entry("GRPO-Guard", "grpo_guard"),
    "dance_grpo": Entry("DanceGRPO", "dance_grpo"),
    "branch_grpo": Entry("BranchGRPO", "branch_grpo"),
    "mixgrpo": Entry("MixGRPO", "mixgrpo"),
    "mixgrpo_flash": Entry("MixGRPO-Flash", "mixgrpo_flash"),
    "mixgrpo_flash_star": Entry("MixGRPO-Flash*", "mixgrpo_flash_star"),
    "pref_grpo": Entry("Pref-GRPO", "pref_grpo"),
    "tree_rpo": Entry("Dynamic-TreeRPO", "tree_rpo"),
    "tempflow_grpo": Entry("TempFlow-GRPO", "tempflow_grpo"),
    "g2rpo": Entry("G2RPO", "g2rpo"),
    "dense_grpo": Entry("DenseGRPO", "dense_grpo"),
    "awm": Entry("AWM", "awm"),
    "diffusion_nft": Entry("DiffusionNFT", "diffusion_nft"),
    "diffusion_opd": Entry("DiffusionOPD", "diffusion_opd", teacher="flow_grpo"),
    "dgpo": Entry("DGPO", "dgpo"),
    "crd": Entry("CRD", "crd"),
}
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
TEACHER_SEED = 2000
TIE = 0.005  # of reward, between learning rates: a quarter of what 240 images leave open
TUNING_SEED, TUNING_PROMPTS = 1000, "train_prompts"  # none of what is reported
BUDGET, QUICK_BUDGET = 100_000, 100_000
IMAGES, QUICK_IMAGES, EVALUATION_STEPS, EVALUATION_SEED = 240, 120, 10, 2**40
POINTS = 8  # of a curve, beside its start
MARGIN, JUDGED = 0.15, 0.8
Run = dict
"""What a job leaves behind, as the JSON has it."""


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
    prompts: str = "test_prompts"
    """The file that evaluations have, by its option in `data`."""

    @property
    def entry(self) -> Entry:
        return ENTRIES[self.name]

    @property
    def images(self) -> int:
        """Of an evaluation."""
        return QUICK_IMAGES if self.is_quick else IMAGES

    def change(self, trainer) -> Callable[[], dict[str, float]]:
        """Do what no option says; returns what is asked at each point of the curve, beside its
        evaluation."""
        return dict

    def is_over(self, curve: list[dict[str, float]]) -> bool:
        """Has it shown what it is for?"""
        return self.is_quick and has_learned(curve)

    def run(self) -> Run:
        """The run; what stopped it early, if anything, is in "failed"."""
        from flowkern.rewards import RewardError

        trainer = _trainer(self)
        more, counter = self.change(trainer), Counter(trainer)
        look = partial(evaluate, trainer, self.images, self.prompts)
        curve = [counter.now | look() | more()]
        traces: list[dict[str, float]] = []
        failed = None
        while counter.total < self.budget:
            try:
                records, seconds = timed(trainer.step)
            except (FloatingPointError, RewardError) as error:
                failed = str(error)
                break
            counter.add(records, seconds)
            traces.append(_trace(records))
            if counter.total >= min(len(curve) * self.budget / self.points, self.budget):
                curve.append(counter.now | look() | more())
                if self.is_over(curve):
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
        self._plan_images = lambda: len(trainer.recipe.plan(trainer.task.model.sigmas).leaves)
        self._with_gradient = 0
        trainer.task.model.network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, args, kwargs) -> None:
        """Calls that will go backward; all calls are in the trainer's metrics."""
        self._with_gradient += len(kwargs["hidden_states"]) if torch.is_grad_enabled() else 0

    @property
    def total(self) -> int:
        return self.now["forward_equivalents"]

    def add(self, records: Sequence[dict[str, float]], seconds: float) -> None:
        """An iteration's metrics."""
        self.images = self.images or self._plan_images()
        now, calls = dict(self.now), sum(record["nfe/train"] for record in records)
        now["iterations"] += 1
        now["sample"] += records[0]["nfe/sample"]
        now["train_gradient"] = self._with_gradient
        now["train_forward"] += calls
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
    from accelerate import PartialState

    from flowkern.train.config import load_config
    from flowkern.train.loading import load_pipeline
    from flowkern.train.loop import Loop

    torch.set_num_threads(1)
    entry = job.entry
    os.chdir(ROOT)  # the configurations' paths are relative to it
    overrides = [*entry.overrides, *job.overrides, f"seed={job.seed}"]
    if entry.teacher is not None:
        overrides.append(f"algorithm.teacher={_teacher(entry.teacher, job.budget).name}")
    config = load_config(CONFIGS / f"{entry.config}.yaml", overrides)
    # A model that is handed over keeps its encoders: evaluations have prompts that no run has.
    return Loop(config, load_pipeline(config, PartialState().device))


@cache
def _teacher(name: str, budget: int) -> TemporaryDirectory:
    """With the weights that an entry has learned; once in a process."""
    trainer, folder = _trainer(Job(name, TEACHER_SEED, budget)), TemporaryDirectory()
    counter = Counter(trainer)
    while counter.total < budget:
        counter.add(*timed(trainer.step))
    trainer.task.save(Path(folder.name))
    return folder


def evaluate(trainer, images: int, prompts: str = "test_prompts") -> dict[str, float]:
    """Of a file of prompts, from the same noise every time, without randomness and guidance."""
    from flowkern.train.prompts import read_prompts

    asked = read_prompts(getattr(trainer.config.data, prompts))
    found = scores(trainer, asked, images, 1.0)
    guidance = trainer.recipe.guidance_scale
    if guidance != 1:  # what the algorithm samples with
        found |= {
            f"guided_{name}": v for name, v in scores(trainer, asked, images, guidance).items()
        }
    return found


def scores(trainer, prompts: Sequence[dict], count: int, guidance_scale: float) -> dict[str, float]:
    from flowkern.rollout import prompt_ids
    from flowkern.train.scoring import score
    from flowkern.train.validation import RESERVED_ITERATION, Sampler, sample_images

    prompts = [prompts[i % len(prompts)] for i in range(count)]
    images = sample_images(
        trainer.task.model,
        [prompt["prompt"] for prompt in prompts],
        prompt_ids(RESERVED_ITERATION, torch.arange(count)),
        Sampler(EVALUATION_STEPS, guidance_scale),
        seed=EVALUATION_SEED,
        max_batch=count,
    )
    found = score(trainer.task.rewards, [(images, prompts)]).rewards
    names = {"reward": "digits_classifier", "judge": "digits_judge", "distance": "distance_to_real"}
    return {name: round(found[key].mean().item(), 5) for name, key in names.items()}


TRACED = ("ratio_mean", "pg_clipfrac_higher", "pg_clipfrac_lower", "kl", "grad_norm")


def _trace(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """An iteration in a few numbers: means over its optimizer steps."""
    first = records[0]
    trace = {"rollout_reward": first["reward/mean"], "zero_std_ratio": first["zero_std_ratio"]}
    trace |= {name: mean(record[name] for record in records) for name in TRACED}
    return {name: float(f"{value:.5g}") for name, value in trace.items()}


def _columns(traces: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [trace[name] for trace in traces] for name in traces[0]} if traces else {}


# ---- what an iteration costs ----

COST_OVERRIDES = ("algorithm.num_inference_steps=25",)
COSTED = ("dance_grpo", "mixgrpo", "mixgrpo_flash", "mixgrpo_flash_star")
COST_ROUNDS = 3
COST_ROLLOUTS = range(60)  # at the demo's pace the windows move as far as in the papers' 300


def iteration_costs() -> list[dict[str, Any]]:
    """The algorithms of the cost claims at the papers' 25 steps, equal images, in turns.

    Seconds are of the first iterations, where the window is at its start; forward-equivalents are
    means over a whole run, by counting the plans.
    """
    from flowkern.rl.cost import mean_cost

    _quiet()
    trainers = {name: _trainer(Job(name, TUNING_SEED, 0, COST_OVERRIDES)) for name in COSTED}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for i in range(1 + COST_ROUNDS):
        for name, trainer in trainers.items():
            taken = timed(trainer.step)[1]
            if i:  # the first warms up
                seconds[name].append(taken)
    costs = []
    for name, trainer in trainers.items():
        recipe = trainer.recipe
        prompts, forwards = recipe.prompts_per_rollout, trainer.task.objective.calls()
        first, whole = (
            mean_cost(recipe, trainer.task.model.sigmas, r)[0] for r in (range(1), COST_ROLLOUTS)
        )
        counts = [prompts * (c.sample + (forwards + 2) * c.train) for c in (first, whole)]
        costs.append({
            "name": name, "images": prompts * whole.images, "seconds": median(seconds[name]),
            "forward_equivalents_first": counts[0], "forward_equivalents_run": counts[1],
            "rollouts": len(COST_ROLLOUTS),
        })  # fmt: skip
    return costs


# ---- many runs ----


def run_all(
    jobs: Sequence[Job], processes: int, each: Callable[[list[Run]], None] = lambda runs: None
) -> list[Run]:
    """Every job; as one ends, a line is printed and `each` gets the runs so far."""
    done: dict[Job, Run] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_quiet) as pool:
        futures = {pool.submit(job.run): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                run = future.result()
            except Exception as error:  # one that cannot run leaves one that says so
                run = {"name": job.name, "seed": job.seed, "overrides": list(job.overrides)}
                run |= {"curve": [], "failed": f"{type(error).__name__}: {error}"}
            done[job] = run
            print(_line(run, f"{len(done)} of {len(jobs)}"), file=sys.stderr, flush=True)
            each([done[job] for job in jobs if job in done])
    return [done[job] for job in jobs]


def _quiet() -> None:
    """In a process of the pool: one thread, no progress bars."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from diffusers.utils import logging

    logging.disable_progress_bar()


def _line(run: Run, count: str) -> str:
    what = " ".join((run["name"], f"seed {run['seed']}", *run["overrides"]))
    if not run["curve"]:
        return f"  {count}: {what}: {run['failed']}"
    start, end = run["curve"][0], run["curve"][-1]
    found = ", ".join(
        f"{key} {start[key]:.3f} to {end[key]:.3f}" for key in ("reward", "judge", "distance")
    )
    best = max(point["reward"] for point in run["curve"])
    failed = f"; {run['failed']}" if "failed" in run else ""
    return (
        f"  {count}: {what}: {found} (best reward {best:.3f}); {end['iterations']} iterations, "
        f"{end['forward_equivalents'] / 1000:.0f}k, {end['seconds']:.0f} s{failed}"
    )
