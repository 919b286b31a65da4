"""What of a rollout is trained: network calls in batches, and what each of them learns from.

P prompts, S sites of a plan (the nodes that trained edges leave, or the points to match at), C
choices that get an advantage (trained edges, or points), R rows of one batch, a network call each,
B choices in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkern.rollout.engine import Rollout, moved
from flowkern.rollout.layout import Layout, Points
from flowkern.schedules import Coefficients


@dataclass(frozen=True)
class StepBatch:
    """Trained edges; those that leave one node share its row."""

    x_t: Tensor
    """(R, *D)"""
    sigma: Tensor
    """(R,)"""
    prompt: Tensor
    """(R,)"""
    row: Tensor | None
    """(B,): the row that each edge leaves; None: B == R."""
    coefficients: Coefficients
    """Of B edges."""
    advantage: Tensor
    """(B,)"""
    weight: Tensor
    """(B,), of the policy term."""
    x_next: Tensor | None
    """(B, *D); None: drawn again from the key, with old_velocity."""
    old_velocity: Tensor | None
    """(R, *D)"""
    key: dict[str, int | Tensor]
    """seed, sample_id (B,), step (B,): of the noise that led to x_next."""


@dataclass(frozen=True)
class PointBatch:
    """Points to match at, B == R; their noise is of stream "match"."""

    x0: Tensor
    """(B, *D)"""
    sigma: Tensor
    """(B,)"""
    prompt: Tensor
    """(B,)"""
    advantage: Tensor
    """(B,)"""
    key: dict[str, int | Tensor]
    """seed, sample_id (B,), step (B,)"""


def network_batches(
    layout: Layout, advantage: Tensor, rank: int, max_batch: int, needs_all: bool
) -> list[tuple[Tensor, Tensor]]:
    """The network calls of one optimizer step on `rank`, by batches: (site (R,), prompt (R,)) each.

    advantage: (ranks, P, C), on the host, of the prompts that every rank trains on in this step.
    needs_all: the loss does not vanish with the advantage. Otherwise calls whose advantages are all
    zero are left out; but every rank gets as many batches as every other, and at least one.
    """
    site, sites = layout.trained.site, layout.sites
    size = advantage.new_zeros(*advantage.shape[:2], sites)
    is_live = (size.index_add(2, site, advantage.abs()) > 0) | needs_all
    live = [each.flatten().nonzero().flatten() for each in is_live]
    batches = max(1, *(math.ceil(len(each) / max_batch) for each in live))
    mine = live[rank]
    if len(mine) < batches:  # as many of those left out come back as it takes
        others = (~is_live[rank]).flatten().nonzero().flatten()
        mine = torch.cat([mine, others[: batches - len(mine)]]).sort().values
    parts = mine.tensor_split(batches)
    return [(part % sites, part // sites) for part in parts]


def batch(
    rollout: Rollout, site: Tensor, prompt: Tensor, advantage: Tensor
) -> StepBatch | PointBatch:
    """What the calls (site, prompt), both (R,), learn from; on the host as is advantage (P, C)."""
    is_points = isinstance(rollout.layout.trained, Points)
    return (_points if is_points else _steps)(rollout, site, prompt, advantage)


def _points(rollout: Rollout, site: Tensor, prompt: Tensor, advantage: Tensor) -> PointBatch:
    points, source = rollout.layout.trained, rollout.source
    device = source.prompt_id.device
    where, leaf_of, step = (moved(value, device) for value in (prompt, points.leaf[site], site))
    return PointBatch(
        x0=rollout.latents[where, leaf_of],
        sigma=moved(points.sigma[site], device, source.precision),
        prompt=where,
        advantage=moved(advantage[prompt, site], device, source.precision),
        key={
            "seed": source.seed,
            "sample_id": source.prompt_id[where] + leaf_of,
            "step": step,
        },
    )


def _steps(rollout: Rollout, site: Tensor, prompt: Tensor, advantage: Tensor) -> StepBatch:
    source, edges = rollout.source, rollout.layout.trained
    device, first, count = source.prompt_id.device, edges.first, edges.count
    # The choices of every row, one row after another.
    row = torch.arange(len(site)).repeat_interleave(count[site])
    within = torch.arange(len(row)) - (count[site].cumsum(0) - count[site])[row]
    choice = edges.order[first[site][row] + within]
    origin = moved(torch.tensor([rollout.kept[i] for i in edges.origins])[site], device)
    where, of_row = moved(prompt, device), moved(row, device)
    noise = moved(edges.noise[choice], device)
    x_next = None
    if not rollout.is_redrawn:
        end = moved(torch.tensor([rollout.kept[i] for i in edges.ends])[choice], device)
        x_next = rollout.states[end, where[of_row]]
    old = rollout.velocity
    return StepBatch(
        x_t=rollout.states[origin, where],
        sigma=moved(edges.sigma[site], device, source.precision),
        prompt=where,
        row=None if len(row) == len(site) else of_row,
        coefficients=Coefficients(moved(edges.table[choice], device, source.precision)),
        advantage=moved(advantage[prompt[row], choice], device, source.precision),
        weight=moved(edges.weight[choice], device, source.precision),
        x_next=x_next,
        old_velocity=None if old is None else old[moved(site, device), where],
        key={
            "seed": source.seed,
            "sample_id": source.prompt_id[where[of_row]] + noise[:, 0],
            "step": noise[:, 1],
        },
    )
