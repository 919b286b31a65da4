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
from flowkern.rollout.layout import Edges, Launch, Layout, Wave
from flowkern.rollout.plan import Plan
from flowkern.schedules import MAX_HISTORY, Coefficients

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, *D), sigma (B,), prompt (B,) int64) -> velocity (B, *D)"""

ITERATION_BITS, PROMPT_BITS, MEMBER_BITS = 24, 16, 23  # 63 bits: ids stay positive


def prompt_ids(iteration: int, slots: Tensor) -> Tensor:
    """Ids (P,) int64 of the prompts in an iteration's slots (P,); with a member added, of samples.

    An id never repeats within a run, however its samples are batched or sharded. slots: on the
    host, as a device would be waited for.
    """
    highest = int(slots.max()) if len(slots) else 0
    for name, value, bits in (
        ("iteration", iteration, ITERATION_BITS),
        ("slots", highest, PROMPT_BITS),
    ):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name}: got {value}, expected 0 to 2**{bits} - 1 in a sample id")
    return ((iteration << PROMPT_BITS) + slots.to(torch.int64)) << MEMBER_BITS


@dataclass(frozen=True)
class Source:
    """What the states of a rollout are drawn from, beside the plan."""

    seed: int
    """Of the run: 64 bits."""
    prompt_id: Tensor
    """(P,) int64, from `prompt_ids`. The velocity function is asked for prompts 0 to P - 1."""
    shape: tuple[int, ...]
    """*D."""
    dtype: torch.dtype = torch.float32
    """Of the states."""

    @property
    def precision(self) -> torch.dtype:
        """Of noise levels, coefficients and advantages."""
        return torch.promote_types(self.dtype, torch.float32)

    def empty(self, *counts: int, dtype: torch.dtype | None = None) -> Tensor:
        """States to be written, (*counts, *D); dtype: if another than theirs."""
        device = self.prompt_id.device
        return torch.empty(*counts, *self.shape, dtype=dtype or self.dtype, device=device)


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


@dataclass(frozen=True)
class Rollout:
    """What sampling leaves behind: the leaves, and what training needs of the way there."""

    layout: Layout
    """Of the plan, made once."""
    source: Source
    latents: Tensor
    """(P, L, *D): the leaves."""
    states: Tensor
    """(K, P, *D): nodes that trained edges leave, and those they lead to unless drawn again."""
    kept: dict[int, int]
    """Node -> its place in `states`."""
    velocity: Tensor | None
    """(O, P, *D): guided, at the plan's origins, of the weights that sampled, in the precision of
    the step kernel; None unless kept."""
    is_redrawn: bool
    """Is x_next drawn again from its seed, with `velocity`, where training needs it?"""

    @property
    def plan(self) -> Plan:
        return self.layout.plan


@torch.no_grad()
def run(
    plan: Plan,
    velocity: Velocity,
    source: Source,
    max_batch: int,
    guidance: Guidance | None = None,
    keep_velocity: bool = False,
    backend: str | None = None,
) -> Rollout:
    """Sample the tree of every prompt.

    max_batch: network calls of one batch at most; guidance takes two per node, in the same batch.
    keep_velocity: needed where the weights will have moved between sampling and training.
    """
    layout, per_node = Layout(plan), 1 if guidance is None else 2
    if max_batch < per_node:
        raise ValueError(f"max_batch: got {max_batch}, expected at least {per_node}")
    rollout, prompts = _empty(layout, source, keep_velocity), len(source.prompt_id)
    x = _roots(plan, layout.waves[0], source, backend)
    memory: list[Tensor] = []  # clean predictions of this wave, of the one before it, ...
    for wave, following in pairwise([*layout.waves, None]):
        _record(rollout, wave, x)
        if following is None:
            break
        x_next = source.empty(len(following.nodes), prompts)
        memory = [source.empty(int((wave.memory >= 0).sum()), prompts), *memory[: MAX_HISTORY - 1]]
        tables = _tables(wave, source, backend)
        for part in slices(len(wave.sigma) * prompts, max_batch // per_node):
            batch = _ask(tables, part, x.flatten(0, 1)[part], velocity, guidance)
            _keep(batch, rollout.velocity, memory[0])
            for launch in tables.launches:
                _walk(batch, *launch, memory[1:], x_next)
        x = x_next
    return rollout


def slices(count: int, size: int) -> list[slice]:
    """As few slices of at most `size` as there can be, of nearly equal length."""
    parts = math.ceil(count / size)
    bounds = [count * i // parts for i in range(parts + 1)] if parts else [0]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _empty(layout: Layout, source: Source, keep_velocity: bool) -> Rollout:
    """What will be left behind, allocated."""
    prompts, trained = len(source.prompt_id), layout.trained
    origins, ends = (trained.origins, trained.ends) if isinstance(trained, Edges) else ((), ())
    kept = sorted({*origins, *ends})
    # A velocity per origin and a seed, in place of the states of many siblings.
    is_redrawn = source.dtype == torch.float32 and 2 * len(origins) < len(kept)
    kept = sorted(origins) if is_redrawn else kept
    velocity = None
    if is_redrawn or keep_velocity:
        velocity = source.empty(len(origins), prompts, dtype=source.precision)
    return Rollout(
        layout,
        source,
        latents=source.empty(prompts, len(layout.plan.leaves)),
        states=source.empty(len(kept), prompts),
        kept={node: place for place, node in enumerate(kept)},
        velocity=velocity,
        is_redrawn=is_redrawn,
    )


def _roots(plan: Plan, wave: Wave, source: Source, backend: str | None) -> Tensor:
    """(W, P, *D): pure noise."""
    member = torch.tensor([plan.nodes[node].member for node in wave.nodes])
    ids = source.prompt_id + member.to(source.prompt_id.device)[:, None]
    shape = (ids.numel(), *source.shape)
    x = philox_normal(shape, source.seed, ids.flatten(), 0, "init", backend=backend)
    return x.to(source.dtype).view(*ids.shape, *source.shape)


def _record(rollout: Rollout, wave: Wave, x: Tensor) -> None:
    """Put aside the leaves, and what training needs, of a wave's states (W, P, *D)."""
    leaves = rollout.plan.leaves
    for position, node in enumerate(wave.nodes):
        if node in leaves:
            rollout.latents[:, leaves[node]] = x[position]
        if node in rollout.kept:
            rollout.states[rollout.kept[node]] = x[position]


@dataclass(frozen=True)
class _Tables:
    """What the batches of a wave index, for every row (W * P) or edge of a prompt (C * P): on the
    device once per rollout, so that a batch copies next to nothing from the host.
    """

    wave: Wave
    source: Source
    backend: str | None
    sigma: Tensor
    prompt: Tensor
    to_clean: Tensor
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
    guide: dict[str, Any]
    """The guidance arguments of a step; none without guidance."""


def _tables(wave: Wave, source: Source, backend: str | None) -> _Tables:
    device, prompts = source.prompt_id.device, len(source.prompt_id)

    def each(value: Tensor) -> Tensor:
        return moved(value, device, source.precision).repeat_interleave(prompts, 0)

    def ids(launch: Launch) -> Tensor | None:
        if launch.member is None:
            return None
        return (source.prompt_id + moved(launch.member, device)[:, None]).flatten()

    return _Tables(
        wave,
        source,
        backend,
        sigma=each(wave.sigma),
        prompt=torch.arange(prompts, device=device).repeat(len(wave.sigma)),
        to_clean=each(wave.to_clean.table),
        launches=[(launch, each(launch.table.table), ids(launch)) for launch in wave.launches],
    )


def _ask(
    tables: _Tables, part: slice, x_t: Tensor, velocity: Velocity, guidance: Guidance | None
) -> _Batch:
    """The velocity of rows `part`, and with guidance that without a prompt."""
    prompt, sigma = tables.prompt[part], tables.sigma[part]
    guide: dict[str, Any] = {}
    if guidance is None:
        v = velocity(x_t, sigma, prompt)
    else:
        both = torch.cat([prompt, torch.full_like(prompt, guidance.uncond)])
        v = velocity(torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both)
        v, guide = guidance.combined(*v.chunk(2), sigma)
    row, prompts = torch.arange(part.start, part.stop), len(tables.source.prompt_id)
    return _Batch(tables, row // prompts, row % prompts, part, x_t, v, guide)


def _keep(batch: _Batch, velocity: Tensor | None, memory: Tensor) -> None:
    """Put aside the velocities that training needs and the predictions that steps need."""
    wave = batch.tables.wave
    if velocity is not None:
        _put(batch, velocity, wave.origin, lambda: guided(batch.velocity, **batch.guide))
    if len(memory):
        to_clean = Coefficients(batch.tables.to_clean[batch.part])
        _put(batch, memory, wave.memory, lambda: _step(batch, slice(None), to_clean))


def _put(batch: _Batch, target: Tensor, places: Tensor, value: Callable[[], Tensor]) -> None:
    place = places[batch.node]
    here = (place >= 0).nonzero().flatten()
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


def moved(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """From the host; converted there, so that the copy waits for nothing on the device."""
    return value.to(dtype or value.dtype).to(device, non_blocking=True)


def guided(velocity: Tensor, velocity_uncond: Tensor | None = None, guidance_scale: float = 1.0):
    """The velocity with guidance, in the precision of the step kernel."""
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    return reference.guided(velocity, velocity_uncond, guidance_scale, dtype)
