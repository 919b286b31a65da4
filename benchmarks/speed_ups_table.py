"""How much less AWM and TempFlow-GRPO take than Flow-GRPO, with what their papers had, in turn.

    python benchmarks/causes.py --table speed_ups --budget 60000 [--only NAME,...]

A factor is a pair of runs that both have it, to a level of the held-out reward, at which they end.
The runs without a factor, and Flow-GRPO's with guidance and KL, are benchmarks/algorithms.py's,
from its JSON in the same folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

from algorithm_runs import scores
from causes import Experiment
from harness import recorded
from plot_algorithms import by_name
from rich.console import Console
from rich.table import Table

IMAGES = 240  # of an evaluation, as in algorithms.py
GUIDANCE = 2.0
LEVEL, GUIDED, LONG = 0.7, 0.9, 0.9
REWARD, GUIDED_REWARD = "reward", "guided_reward"
LABELS = {"flow": "Flow-GRPO", "awm": "AWM", "temp": "TempFlow-GRPO"}
ENTRY = {"flow": "flow_grpo", "awm": "awm", "temp": "tempflow_grpo"}
SHARES = {"flow": 2.0, "awm": 1.6, "temp": 1.6}
"""Evaluations are 12,000 to 15,000 apart."""
KL = {"flow": "kl_coef=0.004", "awm": "ref_coef=0.001", "temp": "kl_coef=0.004"}
GROUPS = {
    "flow": ("group_size=24", "prompts_per_rollout=6"),
    "awm": ("group_size=24", "prompts_per_rollout=6"),
    "temp": ("num_seeds=4", "group_size=6", "prompts_per_rollout=4"),
}


def with_guidance(trainer):
    """What evaluations have with guidance, of an algorithm that samples without."""
    from flowkern.train.prompts import read_prompts

    asked = read_prompts(trainer.config.data.test_prompts)
    return lambda: {f"guided_{k}": v for k, v in scores(trainer, asked, IMAGES, GUIDANCE).items()}


def _of(key: str, what: str, *options: str, **more) -> Experiment:
    overrides = tuple(f"algorithm.{option}" for option in options)
    more = {"share": SHARES[key], "until": ((REWARD, LEVEL),)} | more
    return Experiment(f"{LABELS[key]}: {what}", ENTRY[key], overrides, **more)


BOTH = ((GUIDED_REWARD, GUIDED), (REWARD, LEVEL))
EXPERIMENTS = {
    "awm_plain": _of("awm", "evaluated with guidance, too", change=with_guidance, until=BOTH),
    **{
        f"{key}_guided": _of(key, "guidance", f"guidance_scale={GUIDANCE}", until=BOTH[:1])
        for key in ("awm", "temp")
    },
    **{f"{key}_kl": _of(key, "KL", KL[key]) for key in LABELS},
    **{f"{key}_groups": _of(key, "groups of 24", *GROUPS[key]) for key in LABELS},
    "flow_long": _of("flow", "longer", share=3.6, until=((REWARD, LONG),)),
}


# ---- what the runs say ----


@dataclass(frozen=True)
class Factor:
    """A line: whose runs are held against which of Flow-GRPO's."""

    label: str
    level: float
    flow: str
    others: tuple[str, str]
    """AWM's and TempFlow-GRPO's."""
    key: str = REWARD


AS_THEY_ARE = "flow_grpo", ("awm", "tempflow_grpo")
FACTORS = (
    *(Factor(f"to {level:.2f}", level, *AS_THEY_ARE) for level in (0.56, 0.6, 0.65, 0.7, 0.75)),
    *(Factor(f"to {at:.2f}", at, "flow_long", AS_THEY_ARE[1]) for at in (0.8, 0.85, 0.9)),
    Factor("KL", LEVEL, "flow_kl", ("awm_kl", "temp_kl")),
    Factor("groups of 24", LEVEL, "flow_groups", ("awm_groups", "temp_groups")),
    Factor("guidance in Flow-GRPO alone", 0.58, "flow_grpo_guided", AS_THEY_ARE[1]),
    Factor(
        "the same, reward with guidance", GUIDED, "flow_grpo_guided", ("awm_plain", ""),
        GUIDED_REWARD,
    ),
    Factor(
        "guidance in both, reward with it", GUIDED, "flow_grpo_guided",
        ("awm_guided", "temp_guided"), GUIDED_REWARD,
    ),
)  # fmt: skip
UNITS = ("forward_equivalents", "steps")


def taken(run: dict, key: str, level: float, unit: str) -> tuple[float, bool]:
    """What a run took until a score first passed `level`, and has it? Otherwise, all it took."""
    curve = run["curve"]
    if unit == "steps":
        unit, factor = "iterations", run["optimizer_steps"] / curve[-1]["iterations"]
    else:
        factor = 1
    for before, point in pairwise(curve):
        if point[key] >= level:
            share = (level - before[key]) / (point[key] - before[key])
            return factor * (before[unit] + share * (point[unit] - before[unit])), True
    return factor * curve[-1][unit], False


def cell(flow: list[dict], other: list[dict], factor: Factor) -> Iterator[str]:
    """Forward-equivalents and optimizer steps of Flow-GRPO over another's: means over seeds."""
    for unit in UNITS:
        both = [[taken(r, factor.key, factor.level, unit) for r in runs] for runs in (flow, other)]
        ratio = mean(t for t, _ in both[0]) / mean(t for t, _ in both[1])
        is_least, is_most = (not all(done for _, done in runs) for runs in both)
        bound = "?" if is_least and is_most else ">" if is_least else "<" if is_most else ""
        yield f"{bound}{ratio:.1f}"


def report(result: dict, path: Path) -> None:
    runs = by_name(recorded(path.with_name("algorithms.json"), "runs")["runs"])
    runs |= by_name(result["runs"])
    table = Table(title="Flow-GRPO's over theirs: forward-equivalents / optimizer steps")
    for i, name in enumerate(("", "seeds", "AWM", "seeds", "TempFlow-GRPO", "Flow-GRPO took")):
        table.add_column(name, justify="right" if i else "left")
    for factor in FACTORS:
        flow, cells = runs.get(factor.flow), []
        for name in factor.others:
            pair = (flow, runs.get(name)) if name else (None, None)
            if all(pair):
                counts = "/".join(str(len(each)) for each in pair)
                cells += [counts, " / ".join(cell(*pair, factor))]
            else:
                cells += ["", ""]
        if flow and any(cells):
            found = [taken(run, factor.key, factor.level, UNITS[0]) for run in flow]
            passed = sum(done for _, done in found)
            cells.append(f"{mean(t for t, _ in found) / 1000:.0f}k, {passed} of {len(found)}")
            table.add_row(factor.label, *cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(f"{result['seconds']:.0f} s; {path}")
