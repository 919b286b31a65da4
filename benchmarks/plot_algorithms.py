"""The curves of benchmarks/algorithms.py: means over seeds, what a level takes, and the chart.

Everything here follows from the JSON alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np

from flowkern.checks import counted

LEVELS = (0.60, 0.65, 0.70, 0.75, 0.80, 0.85)
SCORES = {"reward": "reward", "judge": "independent judge", "distance": "distance to real digits"}
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd")
STYLES = ("-", "--", ":", "-.")
Run = dict


def by_name(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that have a curve, by algorithm, in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run["curve"]:
            found.setdefault(run["name"], []).append(run)
    return found


def column(run: Run, key: str) -> list[float]:
    """One quantity along the curve of a run."""
    return [point[key] for point in run["curve"]]


def at(run: Run, key: str, forward_equivalents: float) -> float:
    """A score of a run after so much; between two evaluations on the line that joins them."""
    taken = column(run, "forward_equivalents")
    return float(np.interp(forward_equivalents, taken, column(run, key)))


def to_reach(run: Run, level: float, key: str = "forward_equivalents") -> float | None:
    """What a run took until its reward first passed `level`; None: it never did."""
    reward, taken = column(run, "reward"), column(run, key)
    for i, value in enumerate(reward):
        if value >= level:
            if i == 0:
                return float(taken[0])
            share = (level - reward[i - 1]) / (value - reward[i - 1])
            return taken[i - 1] + share * (taken[i] - taken[i - 1])
    return None


def mean_to_reach(runs: list[Run], level: float, key: str = "forward_equivalents") -> float | None:
    """The mean of `to_reach` over runs; None: not all of them did."""
    found = [to_reach(run, level, key) for run in runs]
    return None if not found or None in found else mean(found)


def common_level(*groups: list[Run]) -> float | None:
    """The highest of LEVELS that every run of every group passes; None: not even the lowest."""
    runs = [run for group in groups for run in group]
    passed = [level for level in LEVELS if all(to_reach(run, level) is not None for run in runs)]
    return max(passed, default=None) if runs else None


def look(place: int) -> tuple[str, str]:
    """Color and style of a line, in the order of the legend."""
    return COLORS[place % len(COLORS)], STYLES[place // len(COLORS) % len(STYLES)]


def plot(result: dict, path: Path) -> None:
    """Reward, judge and distance against forward-equivalents: means, bands from worst to best."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    runs = by_name(result["runs"])
    final = {n: mean(run["curve"][-1]["reward"] for run in group) for n, group in runs.items()}
    names = sorted(runs, key=final.get, reverse=True)
    figure, panels = plt.subplots(1, len(SCORES), figsize=(13, 4.8), layout="constrained")
    for place, name in enumerate(names):
        group = runs[name]
        end = min(run["curve"][-1]["forward_equivalents"] for run in group)
        x = np.linspace(0, end, 101)
        color, style = look(place)
        for axes, key in zip(panels, SCORES, strict=True):
            y = np.array([[at(run, key, value) for value in x] for run in group])
            label = f"{result['labels'].get(name, name)}  {final[name]:.2f}"
            axes.plot(x / 1000, y.mean(0), style, color=color, linewidth=1.6, label=label)
            axes.fill_between(x / 1000, y.min(0), y.max(0), color=color, alpha=0.1, linewidth=0)
    for axes, (key, title) in zip(panels, SCORES.items(), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("thousand forward-equivalents", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if key != "distance":
            axes.set_ylim(top=1)
    handles, labels = panels[0].get_legend_handles_labels()
    title = "reward at the end"
    figure.legend(
        handles, labels, title=title, loc="outside right center", frameon=False, fontsize=9
    )
    settings, machine = result["settings"], result["machine"]
    seeds = counted(len(settings["seeds"]), "seed")
    figure.suptitle(
        f"Demo model, held-out prompts · mean and range of {seeds} · "
        f"{machine['processor']} · torch {machine['torch']} · commit {machine['commit']}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.with_suffix(".png"))
