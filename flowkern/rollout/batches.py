"""What of a rollout is trained: network calls in batches, and what each of them learns from.

P prompts, S sites of a plan (the nodes that trained edges leave, or the points to match at), C
choices that get an advantage (trained edges, or points), R rows of one batch, a network call each,
B choices in it. A choice whose advantage is NaN takes no part: it has no score, and is in no batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkern.ops.sde_step import sde_step
from flowkern.rollout.layout import Layout, Points
from flowkern.rollout.moves import indices, picked, together
from flowkern.rollout.states import OnHost, Rollout, Source
from flowkern.schedules import Coefficients


@dataclass(frozen=True)
class StepBatch:
    """Trained edges; those that leave one node share its row."""

    x_t: Tensor
    """(R, *D)"""
    sigma: Tensor
    """(R,)"""
    on_host: OnHost
    """sigma and prompt, once more."""
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
    """(R, *D); None: the weights are those that sampled."""
    uncond: Tensor | None
    """(R, *D): what those said without a prompt; None: not kept, or not theirs any more."""
    key: dict[str, int | Tensor]
    """seed, sample_id (B,), step (B,): of the noise that led to x_next."""
    sampled: Tensor | None = None
    """(R, *D): what sampling said there, where training is to be held against it."""
    kl_weight: Tensor | None = None
    """(B,), of the KL; None: 1."""


@dataclass(frozen=True)
class PointBatch:
    """Points to match at, B == R; their noise is of stream "match"."""

    x0: Tensor
    """(B, *D)"""
    sigma: Tensor
    """(B,)"""
    on_host: OnHost
    """sigma and prompt, once more."""
    prompt: Tensor
    """(B,)"""
    advantage: Tensor
    """(B,)"""
    group: Tensor
    """(B,): what is compared at one noise level has one number."""
    key: dict[str, int | Tensor]
    """seed, sample_id (B,), step (B,)"""
    kl_weight: Tensor | None = None
    """(B,), of the pull to the reference; None: 1."""


def network_batches(
    layout: Layout,
    advantage: Tensor,
    rank: int,
    max_batch: int,
    needs_all: bool,
    whole: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """The network calls of one optimizer step on `rank`, by batches: (site (R,), prompt (R,)) each.

    advantage: (ranks, P, C), on the host, of the prompts that every rank trains on in this step.
    needs_all: the loss does not vanish with the advantage. Otherwise calls whose advantages are all
    zero are left out; but every rank gets as many batches as every other, and at least one. A batch
    that came back for that, of a call in which nothing takes part, has no other call. whole: what
    is compared with each other, `Points.unit`, is in one batch.
    """
    unit = layout.trained.unit if whole else torch.arange(layout.sites)
    units, size = 1 + int(unit.max()), int(unit.bincount().max())
    if size > max_batch:
        raise ValueError(f"max_batch: got {max_batch}, expected at least {size}, a whole group")
    is_live = _of_sites(layout, ~advantage.isnan() if needs_all else advantage.nan_to_num() != 0)
    has_live = is_live.new_zeros(*is_live.shape[:2], units, dtype=torch.int64)
    has_live = has_live.index_add(2, unit, is_live.long()) > 0
    live = [each.flatten().nonzero().flatten() for each in has_live]
    batches = max(1, *(math.ceil(len(each) / (max_batch // size)) for each in live))
    mine = live[rank]
    if len(mine) < batches:  # as many of those left out come back as it takes
        others = (~has_live[rank]).flatten().nonzero().flatten()
        mine = torch.cat([mine, others[: batches - len(mine)]]).sort().values
    return [_calls(is_live[rank], unit, part, units) for part in mine.tensor_split(batches)]


def _calls(is_live: Tensor, unit: Tensor, part: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """site (R,) and prompt (R,) of units of prompts, of is_live (P, S): a unit's live sites, or one
    call where it has none."""
    prompt, is_there = part // units, unit == (part % units)[:, None]
    calls = is_there & is_live[prompt]
    none = (~calls.any(1)).nonzero().flatten()
    calls[none, is_there[none].long().argmax(1)] = True
    of, site = calls.nonzero(as_tuple=True)
    return site, prompt[of]


def takes_part(layout: Layout, advantage: Tensor, site: Tensor, prompt: Tensor) -> bool:
    """Does anything in a batch (site, prompt), both (R,)? Of advantages (P, C)."""
    is_there = _of_sites(layout, ~advantage[None].isnan())[0]
    return bool(is_there[prompt, site].any())


def _of_sites(layout: Layout, choices: Tensor) -> Tensor:
    """(ranks, P, S) bool, of (ranks, P, C): some choice of the site is."""
    count = torch.zeros(*choices.shape[:2], layout.sites, dtype=torch.int64)
    return count.index_add(2, layout.trained.site, choices.long()) > 0


def batch(
    rollout: Rollout,
    site: Tensor,
    prompt: Tensor,
    advantage: Tensor,
    is_on_policy: bool = False,
    kl_weight: Tensor | None = None,
) -> StepBatch | PointBatch:
    """What the calls (site, prompt), both (R,), learn from; on the host as are advantage and
    kl_weight, (P, C). Where nothing `takes_part`, these are 0, and what is made of it is not to
    count.

    is_on_policy: the weights are those that sampled. Then the ratio is 1 and no old velocity is
    compared with; and what sampling kept of the unconditional half is handed on.
    """
    rollout.wait()
    credit = [advantage] if kl_weight is None else [advantage, kl_weight]
    if isinstance(rollout.layout.trained, Points):
        return _points(rollout, site, prompt, credit)
    return _steps(rollout, site, prompt, credit, is_on_policy)


def _credit(
    tables: Sequence[Tensor], prompt: Tensor, choice: Tensor, source: Source
) -> dict[str, Tensor]:
    """Advantage, and the KL's weight where there is one, (B,) of choices, in one copy."""
    found = [table[prompt, choice].nan_to_num() for table in tables]
    found = together(found, source.prompt_id.device, source.precision)
    return dict(zip(("advantage", "kl_weight"), found, strict=False))


def sampled_velocity(rollout: Rollout, site: Tensor, prompt: Tensor) -> Tensor | None:
    """(R, *D), guided, of the calls (site, prompt) on the host; None: it was not kept."""
    if rollout.velocity is None:
        return None
    rollout.wait()
    device = rollout.source.prompt_id.device
    return picked(rollout.velocity, *indices([site, prompt], device), device)


def _points(rollout: Rollout, site: Tensor, prompt: Tensor, credit: Sequence[Tensor]) -> PointBatch:
    points, source, deal = rollout.layout.trained, rollout.source, rollout.deal
    device = source.prompt_id.device
    there = deal.tables(device, source.precision)
    group = prompt * len(points.site) + points.unit[site]
    at = deal.at(site, prompt, len(points.site))
    at, of_prompt, leaf, group = indices([at, prompt, points.leaf[site], group], device)
    noise = there.numbers[at.there]
    return PointBatch(
        x0=picked(rollout.latents, of_prompt, leaf, device),
        sigma=there.sigma[at.there],
        on_host=OnHost(deal.sigma[at.on_host].tolist(), prompt.tolist()),
        prompt=of_prompt.there,
        **_credit(credit, prompt, site, source),
        group=group.there,
        key={
            "seed": source.seed,
            "sample_id": source.prompt_id[of_prompt.there] + noise[:, 0],
            "step": noise[:, 1],
        },
    )


def _steps(
    rollout: Rollout, site: Tensor, prompt: Tensor, credit: Sequence[Tensor], is_on_policy: bool
) -> StepBatch:
    source, edges, deal = rollout.source, rollout.layout.trained, rollout.deal
    device, first, count = source.prompt_id.device, edges.first, edges.count
    # The choices of every row, one row after another.
    row = torch.arange(len(site)).repeat_interleave(count[site])
    within = torch.arange(len(row)) - (count[site].cumsum(0) - count[site])[row]
    choice = edges.order[first[site][row] + within]
    is_there = ~credit[0][prompt[row], choice].isnan()
    if is_there.any():  # else the batch is a call that nothing takes part in, and is as it would be
        row, choice = row[is_there], choice[is_there]
    place = torch.tensor([rollout.kept[i] for i in edges.origins])[site]
    at = deal.at(site, prompt, rollout.layout.sites)
    of_choice = deal.at(choice, prompt[row], len(edges.site))
    # A kernel reads row, so it is first.
    places = [row, site, at, prompt, place, of_choice, prompt[row]]
    if not rollout.is_redrawn:
        places.append(torch.tensor([rollout.kept[i] for i in edges.ends])[choice])
    of_row, of_site, at, of_prompt, place, of_choice, prompt_of_row, *end = indices(places, device)
    there = deal.tables(device, source.precision)
    noise = there.numbers[of_choice.there]
    key = {
        "seed": source.seed,
        "sample_id": source.prompt_id[prompt_of_row.there] + noise[:, 0],
        "step": noise[:, 1],
    }
    table = Coefficients(there.table[of_choice.there])
    x_t = picked(rollout.states, place, of_prompt, device)
    old = uncond = x_next = None
    if rollout.velocity is not None and (rollout.is_redrawn or not is_on_policy):
        old = picked(rollout.velocity, of_site, of_prompt, device)
    if not rollout.is_redrawn:
        x_next = picked(rollout.states, *end, prompt_of_row, device)
    elif is_on_policy:  # it has its bits from the old velocity, and nothing else has
        of = of_row.there
        x_next = sde_step(x_t[of], old[of], table, **key, backend=rollout.backend)[0]
        old = None
    if is_on_policy and rollout.uncond is not None and int(prompt.max()) < rollout.uncond.shape[1]:
        uncond = picked(rollout.uncond, of_site, of_prompt, device)
    return StepBatch(
        x_t=x_t,
        sigma=there.sigma[at.there],
        on_host=OnHost(deal.sigma[at.on_host].tolist(), prompt.tolist()),
        prompt=of_prompt.there,
        row=None if len(row) == len(site) else of_row.there,
        coefficients=table,
        **_credit(credit, prompt[row], choice, source),
        weight=there.weight[of_choice.there],
        x_next=x_next,
        old_velocity=old,
        uncond=uncond,
        key=key,
    )
