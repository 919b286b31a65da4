"""The chart of benchmarks/causes.py: rewards as rollouts go on, of runs that fall and of others.

    python benchmarks/plot_causes.py PATH

Everything here follows from the JSON alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from plot_algorithms import by_name, column, look

from flowkern.checks import counted

PANELS = {"mix": "MixGRPO at 3e-3", "star": "MixGRPO-Flash* at 6e-3"}
LINES = (
    "falls", "wide", "once", "random", "still", "tail",
    "narrow_long", "slow_long", "slow_narrow_long",
)  # fmt: skip
"""Of experiments, in the order of the legend; those that a file has are drawn."""
OFF = "reward_off_below"


def plot(result: dict, path: Path) -> None:
    """Means, bands from worst to best; crosses: the falling weights with the adapter off."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    runs = by_name(result["runs"])
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 5.4), layout="constrained")
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        for place, name in enumerate(LINES):
            group = runs.get(f"{key}_{name}")
            if group is None:
                continue
            color, style = look(place)
            x = np.arange(1 + min(run["curve"][-1]["iterations"] for run in group))
            y = np.array([
                np.interp(x, column(run, "iterations"), column(run, "reward")) for run in group
            ])  # fmt: skip
            what = result["labels"][f"{key}_{name}"].split(": ")[1]
            label = f"{what} ({counted(len(group), 'seed')})"
            axes.plot(x, y.mean(0), style, color=color, linewidth=1.8, label=label)
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.12, linewidth=0)
            off = [
                (point["iterations"], point[OFF])
                for run in group for point in run["curve"] if OFF in point and point["iterations"]
            ]  # fmt: skip
            if off:
                text = "the same weights, the adapter off below the window"
                axes.plot(*zip(*off, strict=True), "x", color=color, label=text)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("rollouts", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    panels[0].set_ylabel("held-out reward", fontsize=9)
    for axes in panels[1:]:
        axes.sharey(panels[0])
    machine = result["machine"]
    figure.suptitle(
        f"Demo model · mean and range of seeds · {machine['processor']} · torch {machine['torch']} "
        f"· commit {machine['commit']}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.with_suffix(".png"))
