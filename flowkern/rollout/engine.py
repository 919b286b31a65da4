"""Run a plan for a batch of prompts: the network is called once per node, and in batches.

P prompts, *D one latent; W nodes of a wave, L leaves, K kept nodes, O origins of a plan; B rows of
one batch. Nodes of one depth run together, whatever their noise levels. Noise follows from
(seed, sample id, step) alone, so a sample is the same whatever batch, rank or world it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowkern.ops._common.philox import philox_normal
from flowkern.ops.sde_step import ode_step, reference, sde_step
from flowkern.rollout.layout import Launch, Layout, Wave, WaveTables
from flowkern.rollout.moves import moved
from flowkern.rollout.plan import Plan
from flowkern.rollout.states import OnHost, Rollout, Source
from flowkern.schedules import MAX_HISTORY, Coefficients

Velocity = Callable[[Tensor, Tensor, Tensor, OnHost], Tensor]
"""(x_t (B, *D), sigma (B,), prompt (B,) int64, the latter two on the host) -> velocity (B, *D)"""

Guide = Callable[[Tensor, Tensor, float, Tensor], Tensor]
"""(velocity (B, *D), uncond (B, *D), scale, sigma (B,)) -> guided velocity (B, *D)"""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: uncond + scale (velocity - uncond), or what a family makes of the
    three.
    """

    scale: float
    uncond: int
    """The prompt that stands for none."""
    guide: Guide | None = None
    """Differentiable; None: the step kernels do it, in the pass that reads the velocity."""

    @classmethod
    def of(cls, scale: float, uncond: int, guide: Guide | None = None) -> Guidance | None:
        """None where `scale` asks for no guidance, which is up to 1: the one place that decides."""
        return None if scale <= 1 else cls(scale, uncond, guide)

    def combined(self, v: Tensor, uncond: Tensor, sigma: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """A velocity, and the guidance arguments of the step kernels that take it."""
        if self.guide is None:
            return v, {"velocity_uncond": uncond, "guidance_scale": self.scale}
        return self.guide(v, uncond, self.scale, sigma), {}


@torch.no_grad()
def run(
    plan: Plan | Layout,
    velocity: Velocity,
    source: Source,
    max_batch: int,
    guidance: Guidance | None = None,
    keep_velocity: bool = False,
    keep_uncond: int = 0,
    backend: str | None = None,
) -> Rollout:
    """Sample the tree of every prompt.

    max_batch: network calls of one batch at most; guidance takes two per node, in the same batch.
    keep_velocity: needed where the weights will have moved between sampling and training.
    keep_uncond: of how many prompts, from the first on, the unconditional half of guidance is put
    aside: those that are trained on before the weights move.
    """
    layout = plan if isinstance(plan, Layout) else Layout(plan)
    per_node = 1 if guidance is None else 2
    if max_batch < per_node:
        raise ValueError(f"max_batch: got {max_batch}, expected at least {per_node}")
    rollout = Rollout.empty(layout, source, keep_velocity, backend)
    keep_uncond = 0 if guidance is None else min(keep_uncond, source.prompts)
    there = layout.tables(source.prompt_id.device, source.precision)
    x = _roots(there.roots, source, backend)
    memory: list[Tensor] = []  # clean predictions of this wave, of the one before it, ...
    for i, (wave, following) in enumerate(pairwise([*layout.waves, None])):
        rollout.record(wave, x)
        if following is None:
            break
        x_next = source.empty(len(following.nodes), source.prompts)
        fresh = source.empty(int((wave.memory >= 0).sum()), source.prompts)
        memory = [fresh, *memory[: MAX_HISTORY - 1]]
        tables = _tables(wave, there.waves[i], source, backend)
        for part in slices(len(wave.sigma) * source.prompts, max_batch // per_node):
            batch = _ask(tables, part, x.flatten(0, 1)[part], velocity, guidance)
            if keep_uncond and rollout.uncond is None:  # its dtype is the network's
                dtype = batch.uncond.dtype
                rollout.uncond = source.empty(len(layout.origins), keep_uncond, dtype=dtype)
            _keep(batch, rollout, memory[0])
            for launch in tables.launches:
                _walk(batch, *launch, memory[1:], x_next)
        del batch  # it holds this wave's states, and the next is to have their memory
        x = x_next
        del x_next
    return rollout


def slices(count: int, size: int) -> list[slice]:
    """As few slices of at most `size` as there can be, of nearly equal length."""
    parts = math.ceil(count / size)
    bounds = [count * i // parts for i in range(parts + 1)] if parts else [0]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _roots(member: Tensor, source: Source, backend: str | None) -> Tensor:
    """(W, P, *D): pure noise, of members (W,)."""
    ids = source.prompt_id + member[:, None]
    shape = (ids.numel(), *source.shape)
    x = philox_normal(shape, source.seed, ids.flatten(), 0, "init", backend=backend)
    return x.to(source.dtype).view(*ids.shape, *source.shape)


@dataclass(frozen=True)
class _Tables:
    """What the batches of a wave index, for every row (W * P) or edge of a prompt (C * P), made on
    the device of what is there once per rollout.
    """

    wave: Wave
    source: Source
    backend: str | None
    sigma: Tensor
    prompt: Tensor
    to_clean: Tensor
    on_host: OnHost
    """sigma and prompt, once more."""
    launches: list[tuple[Launch, Tensor, Tensor | None]]
    """Each with its coefficients and, where it is noisy, its sample ids."""


@dataclass(frozen=True)
class _Batch:
    """Rows `part` of a wave, a network call each, and what the network says of them."""

    tables: _Tables
    node: Tensor
    """(B,): positions in the wave, on the host; so is prompt."""
    prompt: Tensor
    part: slice
    x_t: Tensor
    velocity: Tensor
    uncond: Tensor | None
    """What it says without a prompt, as it says it; None without guidance."""
    guide: dict[str, Any]
    """The guidance arguments of a step; none without guidance."""


def _tables(wave: Wave, there: WaveTables, source: Source, backend: str | None) -> _Tables:
    device, prompts = source.prompt_id.device, source.prompts

    def each(value: Tensor) -> Tensor:
        return value.repeat_interleave(prompts, 0)

    def ids(member: Tensor | None) -> Tensor | None:
        return None if member is None else (source.prompt_id + member[:, None]).flatten()

    return _Tables(
        wave,
        source,
        backend,
        sigma=each(there.sigma),
        prompt=(torch.arange(prompts, device=device) + source.first).repeat(len(wave.sigma)),
        to_clean=each(there.to_clean),
        on_host=OnHost(
            wave.sigma.repeat_interleave(prompts).tolist(),
            [*range(source.first, source.first + prompts)] * len(wave.sigma),
        ),
        launches=[
            (launch, each(table), ids(member))
            for launch, (table, member) in zip(wave.launches, there.launches, strict=True)
        ],
    )


def _ask(
    tables: _Tables, part: slice, x_t: Tensor, velocity: Velocity, guidance: Guidance | None
) -> _Batch:
    """The velocity of rows `part`, and with guidance that without a prompt."""
    prompts = tables.source.prompts
    row = torch.arange(part.start, part.stop)
    node, prompt, sigma = row // prompts, tables.prompt[part], tables.sigma[part]
    on_host = OnHost(*(known[part] for known in tables.on_host))
    uncond, guide = None, {}
    if guidance is None:
        v = velocity(x_t, sigma, prompt, on_host)
    else:
        both = torch.cat([prompt, torch.full_like(prompt, guidance.uncond)])
        twice = torch.cat([x_t, x_t]), torch.cat([sigma, sigma])
        v, uncond = velocity(*twice, both, on_host.twice(guidance.uncond)).chunk(2)
        v, guide = guidance.combined(v, uncond, sigma)
    return _Batch(tables, node, row % prompts, part, x_t, v, uncond, guide)


def _keep(batch: _Batch, rollout: Rollout, memory: Tensor) -> None:
    """Put aside the velocities that training needs and the predictions that steps need."""
    wave = batch.tables.wave
    if rollout.velocity is not None:
        _put(batch, rollout.velocity, wave.origin, lambda: guided(batch.velocity, **batch.guide))
    if rollout.uncond is not None:
        _put(batch, rollout.uncond, wave.origin, lambda: batch.uncond)
    if len(memory):
        to_clean = Coefficients(batch.tables.to_clean[batch.part])
        _put(batch, memory, wave.memory, lambda: _step(batch, slice(None), to_clean))


def _put(batch: _Batch, target: Tensor, places: Tensor, value: Callable[[], Tensor]) -> None:
    """Of the rows that have a place, and of those the first prompts, as many as target has."""
    place = places[batch.node]
    here = ((place >= 0) & (batch.prompt < target.shape[1])).nonzero().flatten()
    if len(here):
        entry = place[here] * target.shape[1] + batch.prompt[here]
        device = target.device
        target.flatten(0, 1)[_index(entry, device)] = value()[_index(here, device)]


def _walk(
    batch: _Batch,
    launch: Launch,
    table: Tensor,
    ids: Tensor | None,
    memory: list[Tensor],
    x_next: Tensor,
) -> None:
    """Walk the edges of a launch that leave these rows, into x_next (W, P, *D)."""
    prompts, device = x_next.shape[1], x_next.device
    edge, prompt, row = launch.within(batch.part, prompts)
    if not len(edge):
        return
    options: dict[str, Any] = {}
    if launch.history:
        options["history"] = [
            earlier.flatten(0, 1)[_index(places[edge] * prompts + prompt, device)]
            for places, earlier in zip(launch.history, memory, strict=False)
        ]
    entry = _index(edge * prompts + prompt, device)
    if ids is not None:
        seed, step = batch.tables.source.seed, batch.tables.wave.depth
        options |= {"seed": seed, "sample_id": ids[entry], "step": step}
    target = _index(launch.child[edge] * prompts + prompt, device)
    coefficients = Coefficients(table[entry], launch.table.num_history)
    x_next.flatten(0, 1)[target] = _step(batch, _index(row, device), coefficients, **options)


def _step(
    batch: _Batch, rows: slice | Tensor, coefficients: Coefficients, **options: Any
) -> Tensor:
    options |= {"out_dtype": batch.tables.source.dtype, "backend": batch.tables.backend}
    for name, value in batch.guide.items():
        options[name] = value[rows] if isinstance(value, Tensor) else value
    inputs = (batch.x_t[rows], batch.velocity[rows], coefficients)
    return sde_step(*inputs, **options)[0] if "seed" in options else ode_step(*inputs, **options)


def _index(index: Tensor, device: torch.device) -> slice | Tensor:
    """Rows that follow each other as a slice, which copies nothing."""
    first = int(index[0])
    if torch.equal(index, torch.arange(first, first + len(index))):
        return slice(first, first + len(index))
    return moved(index, device)


def guided(velocity: Tensor, velocity_uncond: Tensor | None = None, guidance_scale: float = 1.0):
    """The velocity with guidance, in the precision of the step kernel."""
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    return reference.guided(velocity, velocity_uncond, guidance_scale, dtype)
