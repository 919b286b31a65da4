"""The chart of a benchmark: how many times faster flowkern is, from the JSON alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLORS = {"eager, buffers reused": "#4c72b0", "eager": "#9db4d8", "torch.compile": "#dd8452"}
COLORS |= {
    "torch.compile, fallback_random": "#f0bb93",
    "plain PyTorch, one group at a time": "#55a868",
}
COLORS |= {"plain PyTorch, one sample at a time": "#a3d1ad"}
COLORS |= {
    "diffusers": "#8172b3",
    "torch.randn": "#937860",
    "torch.randn, buffer reused": "#bfae9e",
}
COLORS |= {"eager, recorded": "#c9d6ea", "the published scripts": "#c44e52"}


# The README's chart: a row of each kind, by op and case.
SUMMARY = {
    ("sde_step", "draw, image"): "one SDE step, image",
    ("sde_step", "draw, video"): "one SDE step, video",
    ("sde_step", "replay + gradient, image"): "log-probability and gradient, image",
    ("policy_loss", "forward + backward, off policy, image"): "policy loss and gradient, image",
    ("policy_loss", "forward + backward, off policy, video"): "policy loss and gradient, video",
    ("matching_loss", "awm, forward + backward, image"): "AWM loss and gradient, image",
}


def plot(result: dict, path: Path) -> None:
    """All cases against all rivals; beside it, where all of SUMMARY are there, those six against
    two: PATH-summary.png.
    """
    draw(cases(result), result["machine"], path)
    if len(chosen := summary(result)) == len(SUMMARY):
        draw(chosen, result["machine"], path.with_name(f"{path.stem}-summary.png"))


def draw(groups: dict[str, list[dict]], machine: dict, path: Path) -> None:
    """One group of bars per case, one bar per rival; a rival that did not run has none."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    bars, labels, position = [], [], 0.0
    for title, rows in groups.items():
        rivals = [r for r in rows if "flowkern_is_faster_by" in r]
        if not rivals:
            continue
        for row in rivals:
            bars.append((position, row))
            position += 1
        labels.append((position - len(rivals) / 2 - 0.5, title))
        position += 0.9
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.23 * position), layout="constrained")
    seen = set()
    for y, row in bars:
        name, factor = row["backend"], row["flowkern_is_faster_by"]
        label = None if name in seen else f"than {name}"
        axes.barh(y, factor - 1, left=1, color=COLORS.get(name, "#888888"), label=label)
        beside = {"ha": "left", "x": factor * 1.05} if factor >= 1 else {"ha": "left", "x": 1.05}
        axes.text(y=y, s=f"{factor:.1f}×", va="center", fontsize=8, **beside)
        seen.add(name)
    factors = [row["flowkern_is_faster_by"] for _, row in bars]
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(1, *factors), 1.5 * max(factors))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")  # the ends of a decade are enough
    axes.set_yticks([y for y, _ in labels], [title for _, title in labels], fontsize=9)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("flowkern is faster by (median, log scale)")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    axes.set_title(
        f"{where} · torch {machine['torch']} · commit {machine['commit']}", fontsize=9, loc="left"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def summary(result: dict) -> dict[str, list[dict]]:
    """The cases of SUMMARY: eager PyTorch, and the best form of torch.compile."""
    chosen = {}
    for (op, case), title in SUMMARY.items():
        rows = [
            r
            for r in result["rows"]
            if (r["op"], r["case"], r["dtype"]) == (op, case, "float32")
            and "flowkern_is_faster_by" in r
        ]
        eager = [r for r in rows if r["backend"] == "eager"]
        compiled = [r for r in rows if r["backend"].startswith("torch.compile")]
        if eager and compiled:
            best = min(compiled, key=lambda r: r["ms_p50"])
            chosen[title] = [*eager, best | {"backend": "torch.compile"}]
    return chosen


def cases(result: dict) -> dict[str, list[dict]]:
    """Rows by case, in order."""
    grouped: dict[str, list[dict]] = {}
    for row in result["rows"]:
        dtype = "" if row["dtype"] == "float32" else f" ({row['dtype']})"
        prefix = {
            "training_step": "training step: ",
            "train_step": "training step: ",
            "policy_loss": "policy loss: ",
            "matching_loss": "matching loss: ",
        }.get(row["op"], "")
        grouped.setdefault(f"{prefix}{row['case']}{dtype}", []).append(row)
    return grouped


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.with_suffix(".png"))
