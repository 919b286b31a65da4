"""What the runs of the algorithms say: tables, and the papers' claims beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from plot_algorithms import LEVELS, by_name, common_level, mean_to_reach, plot
from rich.console import Console
from rich.table import Table

Row = dict


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
        "mixgrpo", "4 steps of 25 are trained instead of 14",
    )  # fmt: skip
    cheaper(
        "MixGRPO-Flash in 71 % less",
        "mixgrpo_flash", "and fewer steps follow the window, which moves on and leaves fewer",
    )  # fmt: skip
    cheaper("", "mixgrpo_flash_star", "Flash*: fewer still, and the window stays")
    faster(
        "TempFlow-GRPO: Flow-GRPO's reward at a tenth of the GPU hours",
        "tempflow_grpo", "flow_grpo",
        "every reward is credited to the one step that was drawn, and siblings share a row in "
        "training; a rollout's images have more in common",
    )  # fmt: skip
    if {"g2rpo", "mixgrpo"} <= set(runs):
        ends = [[row["curve"][-1]["reward"] for row in runs[n]] for n in ("g2rpo", "mixgrpo")]
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
