"""What the runs of the algorithms say: tables from the JSON alone. docs/digits.md concludes, and
docs/claims.md, which benchmarks/claims.py makes of the same, holds the papers to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from plot_algorithms import by_name, mean_to_reach, plot
from rich.console import Console
from rich.table import Table

Run = dict

SCORES = {key: key for key in ("reward", "judge", "distance")} | {"guided_reward": "guided"}
"""Of the points of a curve, with their columns; the last where the run is one with guidance."""


def report(result: dict, path: Path) -> None:
    machine, settings = result["machine"], result["settings"]
    print(
        f"flowkern {machine['flowkern']} at {machine['commit']}"
        f"{' (modified)' if machine['dirty'] else ''} on {machine['processor']}, "
        f"{settings['processes']} processes of one thread; torch {machine['torch']}, "
        f"{machine['utc']} UTC"
    )
    console = Console(width=None if sys.stdout.isatty() else 140)
    runs = by_name(result["runs"])
    if len({tuple(run["overrides"]) for run in result["runs"]}) > 1:  # --tune: a line per run
        runs = {" ".join((r["name"], *r["overrides"])): [r] for r in result["runs"] if r["curve"]}
    runs = {result["labels"].get(name, name): group for name, group in runs.items()}
    console.print(_score_table(runs))
    console.print(_count_table(runs))
    if result.get("iterations"):
        console.print(_cost_table(result))
    plot(result, path.with_suffix(".png"))
    print(f"{result['seconds']:.0f} s; {path} and {path.with_suffix('.png').name}")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _score_table(runs: dict[str, list[Run]]) -> Table:
    """What was reached."""
    out = []
    for name, group in runs.items():
        start, end = group[0]["curve"][0], _end(group)
        gains = {key: f"{start[key]:.2f} to {end[key]:.3f}" for key in SCORES if key in start}
        rewards = [run["curve"][-1]["reward"] for run in group]
        out.append((
            name,
            *(gains.get(key, "") for key in SCORES),
            f"{min(rewards):.3f} to {max(rewards):.3f}",
            *(_reached(group, level) for level in (0.7, 0.8)),
        ))  # fmt: skip
    columns = ("", *SCORES.values(), "reward by seed", "to .70", "to .80")
    title = "Held-out prompts: means over seeds; to a reward: forward-equivalents, processor time"
    return _table(title, columns, out)


def _count_table(runs: dict[str, list[Run]]) -> Table:
    """What it took."""
    out = []
    for name, group in runs.items():
        end, images = _end(group), mean(run["images_per_iteration"] for run in group)
        kinds = ("sample", "train_forward", "train_gradient", "forward_equivalents")
        out.append((
            name, f"{group[0]['learning_rate']:g}", f"{images:.0f}", f"{end['iterations']:.0f}",
            f"{mean(run['optimizer_steps'] for run in group):.0f}",
            *(f"{end[key] / 1000:.1f}k" for key in kinds), f"{end['seconds']:.0f}",
        ))  # fmt: skip
    columns = (
        "", "learning rate", "images", "iterations", "updates", "calls sampling", "calls training",
        "with gradient", "forward-equivalents", "s",
    )  # fmt: skip
    return _table("Of a run: images of an iteration, and what was called in all", columns, out)


def _end(group: list[Run]) -> dict[str, float]:
    """The means of the last points of the curves."""
    ends = [run["curve"][-1] for run in group]
    return {key: mean(point[key] for point in ends) for key in ends[0]}


def _reached(group: list[Run], level: float) -> str:
    taken = mean_to_reach(group, level)
    if taken is None:
        count = sum(mean_to_reach([run], level) is not None for run in group)
        return f"{count} of {len(group)}"
    return f"{taken / 1000:.0f}k, {mean_to_reach(group, level, 'seconds'):.0f} s"


def _cost_table(result: dict) -> Table:
    """An iteration, beside the first one's: DanceGRPO's."""
    first, out = result["iterations"][0], []
    for cost in result["iterations"]:
        count, seconds = cost["forward_equivalents_run"], cost["seconds"]
        out.append((
            result["labels"].get(cost["name"], cost["name"]), f"{cost['images']:.0f}",
            f"{count:.0f} ({count / first['forward_equivalents_run']:.0%})",
            f"{seconds:.2f} ({seconds / first['seconds']:.0%})",
        ))  # fmt: skip
    columns = ("", "images", "forward-equivalents, mean of a run", "s, first iterations")
    return _table("An iteration with the papers' number of steps", columns, out)
