"""The chart and the tables of benchmarks/agent.py's results, from their JSON alone.

    python benchmarks/plot_agent.py [FOLDER] [--picture docs/images/agent.png]

Thick: success on held-out questions, sampled; thin: the reward of each rollout in training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LABELS = {
    "main": "the demo",
    "final_turn": "final turn only",
    "by_row": "statistics by row",
    "token_mean": "token_mean",
    "no_kl": "without the KL",
    "kl_05": "KL .05",
    "entropy_bonus": "entropy bonus .01",
    "group_32": "groups of 32",
}
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd")
HARD = "hard_"
Result = dict


def read(folder: Path) -> dict[bool, dict[str, Result]]:
    """By whether they are of all five kinds, and by the name of what was changed, in order."""
    found: dict[bool, dict[str, Result]] = {False: {}, True: {}}
    for name in LABELS:
        for is_hard in found:
            path = folder / f"{HARD if is_hard else ''}{name}.json"
            if path.exists():
                found[is_hard][name] = json.loads(path.read_text())
    return found


def plot(results: dict[bool, dict[str, Result]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    titles = "three kinds of questions (the demo)", "all five kinds (the hard split)"
    for axes, title, of_kinds in zip(panels, titles, results.values(), strict=True):
        for name, result in of_kinds.items():
            color, label = COLORS[list(LABELS).index(name)], LABELS[name]
            for one in result["seeds"]:
                steps = [at["step"] for at in one["rollouts"]]
                rewards = [at["reward/mean"] for at in one["rollouts"]]
                axes.plot(steps, rewards, color=color, linewidth=0.6, alpha=0.35)
                steps = [at["step"] for at in one["evaluations"]]
                success = [at["eval/success"] for at in one["evaluations"]]
                axes.plot(steps, success, "o-", color=color, label=label, markersize=3.5)
                label = None  # of the first seed only
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer steps", fontsize=9)
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    panels[0].set_ylabel("share of right answers", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(results: dict[str, Result]) -> list[str]:
    """Markdown: sampled / greedy by step, then the last evaluation by kind, sampled / greedy."""
    first = next(iter(results.values()))["seeds"][0]["evaluations"]
    start = "eval/success/"
    kinds = sorted(key.removeprefix(start) for key in first[0] if key.startswith(start))
    steps = [str(one["step"]) for one in first]
    heads = ["", "seed", *steps, *kinds, "malformed turns at the last"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, result in results.items():
        for one in result["seeds"]:
            last = one["evaluations"][-1]
            cells = [_both(at, "") for at in one["evaluations"]]
            cells += [_both(last, f"/{kind}") for kind in kinds] + [_share(last["eval/malformed"])]
            lines.append(f"| {' | '.join([LABELS[name], str(one['seed']), *cells])} |")
    return lines


def _both(evaluation: dict[str, float], end: str) -> str:
    return " / ".join(_share(evaluation[f"eval/{key}{end}"]) for key in KEYS)


KEYS = "success", "success_greedy"


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "benchmarks/results/agent")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/agent.png")
    options = parser.parse_args()
    results = read(options.folder)
    for of_kinds in results.values():
        if of_kinds:
            print("\n".join(table(of_kinds)), end="\n\n")
    plot(results, options.picture)


if __name__ == "__main__":
    main()
