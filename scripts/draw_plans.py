"""Draw the tree of every algorithm from its own plan, at sizes small enough to be read.

    python scripts/draw_plans.py [NAME ...]    # into docs/images/algorithms

The grid is that of equal steps shifted by 3, and the axis is even in them.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowkern.rl.algorithms import names, recipe
from flowkern.rollout import Plan
from flowkern.schedules import shifted_sigmas
from flowkern.train.tracking import ACCENT, INK, SOFT

OUTPUT = Path(__file__).parents[1] / "docs/images/algorithms"
GREY = "#a8a8a8"
TICK, SQUARE = {"marker": "|", "ms": 12, "mew": 2.8}, {"marker": "s", "ms": 6.5}
GROUPS = "#2a8c6a #8a4fa3 #d1a800 #b5473c #4a4a4a #3c9fb5 #d977a8 #8a6b4f".split()
EVEN = partial(shifted_sigmas, shift=3.0)
HEAD, ROW, FOOT, LEGEND = 0.42, 0.2, 0.34, 0.5  # inches

SIZES = {"num_inference_steps": 8, "group_size": 3, "guidance_scale": 1.0}
SHORT, WIDE = {"num_inference_steps": 6}, {"num_inference_steps": 18}
LONG = {"num_inference_steps": 12, "window_iterations": 1}
FEW = {"num_inference_steps": 5, "num_seeds": 2}
FIRST, LATER = (", first rollout", LONG, 0), (", three moves later", LONG, 3)
TEN = {"num_inference_steps": 10, "num_train_timesteps": 4}
LAYERS = {"window": 3, "window_iterations": 1, "group_size": 6}
THREE = {"split_steps": [0, 2, 4]}
ALONE = {"uncond_gradient": False, "teacher_guidance_scale": 1.0}
BRANCHING = (", branching", {"branching": True}, 3)
# The trees of one picture: what follows the title, options beside SIZES, number of the rollout.
PANELS: dict[str, tuple[str, list[tuple[str, dict, int]]]] = {
    "flow_grpo": ("Flow-GRPO", [("", SHORT, 0)]),
    "flow_dppo": ("Flow-DPPO", [("", {"num_inference_steps": 10}, 2)]),
    "flash_grpo": ("Flash-GRPO", [(", a prompt", {}, 9), (", another prompt", {}, 0)]),
    "flow_grpo_fast": ("Flow-GRPO-Fast", [(", window", {}, 5), BRANCHING]),
    "gardo": ("GARDO", [("", {"num_inference_steps": 10}, 0)]),
    "grpo_guard": ("GRPO-Guard", [("", SHORT, 0)]),
    "dance_grpo": ("DanceGRPO", [("", {}, 0)]),
    "branch_grpo": (
        "BranchGRPO",
        [(", three splits", {"num_inference_steps": 10, "group_size": 8} | THREE, 0)],
    ),
    "mixgrpo": ("MixGRPO", [FIRST, LATER]),
    "mixgrpo_flash": ("MixGRPO-Flash", [FIRST, LATER]),
    "mixgrpo_flash_star": ("MixGRPO-Flash*", [(", every rollout", WIDE, 0)]),
    "pref_grpo": ("Pref-GRPO", [("", {}, 0)]),
    "tree_rpo": (
        "Dynamic-TreeRPO",
        [(", first rollout", LAYERS, 0), (", two moves later", LAYERS, 2)],
    ),
    "tempflow_grpo": ("TempFlow-GRPO", [(", two trunks", FEW, 0)]),
    "dense_grpo": ("DenseGRPO", [("", {"num_inference_steps": 5}, 0)]),
    "g2rpo": ("G2RPO", [(", step sizes 1 and 2", {"branch_steps": 4}, 0)]),
    "awm": ("AWM", [("", TEN, 0)]),
    "diffusion_nft": ("DiffusionNFT", [("", {}, 0)]),
    "diffusion_opd": ("DiffusionOPD", [("", ALONE | {"num_inference_steps": 6}, 0)]),
    "dgpo": ("DGPO", [("", {}, 0)]),
    "crd": ("CRD", [("", {}, 0)]),
}


def picture(name: str) -> Figure:
    """The trees of an algorithm, one below the other, and what the marks mean."""
    title, panels = PANELS[name]
    panels = [(form, recipe(name)(**SIZES | more), i) for form, more, i in panels]
    plans = [algorithm.plan(EVEN, i) for _, algorithm, i in panels]
    heights = [HEAD + ROW * len(plan.leaves) + FOOT for plan in plans]
    total = top = sum(heights) + LEGEND
    figure = Figure(figsize=(8, total), dpi=160, facecolor="white")
    for (form, algorithm, i), plan, height in zip(panels, plans, heights, strict=True):
        bottom = top - height
        share = (height - HEAD - FOOT) / total
        axes = figure.add_axes((0.04, (bottom + FOOT) / total, 0.93, share))
        draw(axes, plan)
        levels = EVEN(algorithm.num_inference_steps).tolist()
        labels = [f"{level:.2f}".removesuffix(".00").lstrip("0") or "0" for level in levels]
        axes.set_xticks([across(level) for level in levels], labels)
        ours, theirs = plan.cost(), algorithm.released(i)
        cost = f"{ours.sample} calls, released loop {theirs.sample:g}; "
        cost += f"training {ours.train}, released {theirs.train}"
        place = {"y": (top - 0.24) / total, "va": "center", "color": INK}
        figure.text(0.03, s=title + form, fontsize=11, weight="bold", **place)
        figure.text(0.98, s=cost, fontsize=9.5, ha="right", **place)
        top = bottom
    axes.set_xlabel("noise level", fontsize=8, color=INK, labelpad=1)
    legend(figure, plans)
    return figure


def across(sigma: float) -> float:
    """The place of a noise level on the axis: where the even grid had it before its shift."""
    return 1 - sigma / (3 - 2 * sigma)


def heights(plan: Plan) -> dict[int, float]:
    """The height of every node: leaves are one apart, and no edges cross."""
    children: dict[int, list[int]] = {}
    for i, node in enumerate(plan.nodes):
        children.setdefault(node.parent, []).append(i)
    height: dict[int, float] = {}

    def visit(node: int) -> float:
        below = sorted(children.get(node, []), key=lambda i: plan.nodes[i].member is not None)
        places = [visit(child) for child in below] or [sum(i in plan.leaves for i in height)]
        goes_on = below and plan.nodes[below[0]].member is None  # a trunk runs straight
        height[node] = places[0] if goes_on else sum(places) / len(places)
        return height[node]

    for root in children[-1]:
        visit(root)
    return height


def draw(axes: Axes, plan: Plan) -> None:
    height, leaves = heights(plan), list(plan.leaves)
    for i, node in enumerate(plan.nodes):
        x, y = across(node.sigma), height[i]
        if node.parent >= 0:
            color, width = (GREY, 0.9) if node.member is None else (SOFT, 1.3)
            color, width = (ACCENT, 2.8) if node.is_trained else (color, width)
            before = across(plan.nodes[node.parent].sigma), height[node.parent]
            axes.plot(*zip(before, (x, y), strict=True), color=color, lw=width, zorder=1 + width)
        if i in plan.leaves:
            color = GROUPS[plan.groups[plan.leaves[i]]]
            axes.plot(x, y, color=color, zorder=6, **SQUARE)
        else:
            axes.plot(x, y, "o", color=INK, ms=3.6, zorder=5)
    for leaf, sigma in plan.points:
        axes.plot(across(sigma), height[leaves[leaf]], color=ACCENT, zorder=4, **TICK)
    axes.set(xlim=(-0.015, 1.015), ylim=(max(height.values()) + 0.6, -0.6), yticks=[])
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.spines[:].set_visible(False)


def legend(figure: Figure, plans: list[Plan]) -> None:
    """Of the marks that there are."""
    edges = {(n.member is None, n.is_trained) for p in plans for n in p.nodes if n.parent >= 0}
    has_points, has_groups = plans[0].points, len({*plans[0].groups}) > 1
    marks = (
        (True, "network call", {"marker": "o", "color": INK, "ms": 4, "lw": 0}),
        ((True, False) in edges, "deterministic step", {"color": GREY, "lw": 1.2}),
        ((False, False) in edges, "drawn", {"color": SOFT, "lw": 1.6}),
        ((False, True) in edges, "drawn and trained", {"color": ACCENT, "lw": 2.8}),
        (has_points, "training matches here", {"color": ACCENT, "lw": 0, **TICK}),
        (not has_groups, "image", {"color": GROUPS[0], "lw": 0, **SQUARE}),
        (has_groups, "image, one color per comparison", {"color": GROUPS[0], "lw": 0, **SQUARE}),
    )
    handles = [Line2D([], [], label=label, **look) for is_there, label, look in marks if is_there]
    look = {"frameon": False, "fontsize": 9, "labelcolor": INK, "columnspacing": 1.6}
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), **look)


if __name__ == "__main__":
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or names():
        picture(name).savefig(OUTPUT / f"{name}.png")
