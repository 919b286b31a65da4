"""Run a plan for a batch of prompts: the network is called once per node, and for many at once.

P prompts, *D one latent; W nodes of a wave, L leaves, K kept nodes, O origins of a plan; B rows of
one call. Nodes of one depth run together, whatever their noise levels. Noise follows from
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
from flowkern.rollout.plan import Plan
from flowkern.rollout.waves import Launch, Wave, waves
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

    def empty(self, *rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """States to be written, (*rows, *D); dtype: if another than theirs."""
        device = self.prompt_id.device
        return torch.empty(*rows, *self.shape, dtype=dtype or self.dtype, device=device)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: uncond + scale (velocity - uncond)."""

    scale: float
    uncond: int
    """The prompt that stands for none."""

    @classmethod
    def of(cls, scale: float, uncond: int) -> Guidance | None:
        """None where `scale` asks for no guidance, which is up to 1: the one place that decides."""
        return None if scale <= 1 else cls(scale, uncond)


@dataclass(frozen=True)
class Rollout:
    """What sampling leaves behind: the leaves, and what training needs of the way there."""

    plan: Plan
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

    max_batch: rows of one network call at most; guidance takes two rows per node, in one call.
    keep_velocity: needed where the weights will have moved between sampling and training.
    """
    plan.check()
    per_node = 1 if guidance is None else 2
    if max_batch < per_node:
        raise ValueError(f"max_batch: got {max_batch}, expected at least {per_node}")
    rollout = _empty(plan, source, keep_velocity)
    prompts, layout = len(source.prompt_id), waves(plan)
    x = _roots(plan, layout[0], source, backend)
    memory: list[Tensor] = []  # clean predictions of this wave, of the one before it, ...
    for wave, following in pairwise([*layout, None]):
        _record(rollout, wave, x)
        if following is None:
            break
        x_next = source.empty(len(following.nodes), prompts)
        memory = [source.empty(int((wave.memory >= 0).sum()), prompts), *memory[: MAX_HISTORY - 1]]
        tables = _Tables(wave, source)
        for part in slices(len(wave.sigma) * prompts, max_batch // per_node):
            call = _Call(wave, tables, part, x.flatten(0, 1)[part], source, backend)
            call.ask(velocity, guidance)
            call.record(rollout.velocity, memory[0])
            for which in range(len(wave.launches)):
                call.go(which, memory[1:], x_next)
        x = x_next
    return rollout


def slices(count: int, size: int) -> list[slice]:
    """As few slices of at most `size` as there can be, of nearly equal length."""
    parts = math.ceil(count / size)
    bounds = [count * i // parts for i in range(parts + 1)] if parts else [0]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _empty(plan: Plan, source: Source, keep_velocity: bool) -> Rollout:
    """What will be left behind, allocated."""
    prompts, origins = len(source.prompt_id), plan.origins
    kept = sorted({*origins, *plan.trained})
    # A velocity per origin and a seed, in place of the states of many siblings.
    is_redrawn = source.dtype == torch.float32 and 2 * len(origins) < len(kept)
    kept = sorted(origins) if is_redrawn else kept
    velocity = None
    if is_redrawn or keep_velocity:
        velocity = source.empty(len(origins), prompts, dtype=source.precision)
    return Rollout(
        plan,
        source,
        latents=source.empty(prompts, len(plan.leaves)),
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


class _Tables:
    """What the calls of a wave index, for every row (W * P) or edge of a prompt (C * P): on the
    device once per rollout, so that a call copies next to nothing from the host.
    """

    def __init__(self, wave: Wave, source: Source):
        device, prompts = source.prompt_id.device, len(source.prompt_id)

        def each(value: Tensor) -> Tensor:
            return moved(value, device, source.precision).repeat_interleave(prompts, 0)

        def ids(launch: Launch) -> Tensor | None:
            if launch.member is None:
                return None
            return (source.prompt_id + moved(launch.member, device)[:, None]).flatten()

        self.sigma = each(wave.sigma)
        self.prompt = torch.arange(prompts, device=device).repeat(len(wave.sigma))
        self.to_clean = each(wave.to_clean.table)
        self.launches = [(each(launch.table.table), ids(launch)) for launch in wave.launches]


class _Call:
    """One network call: rows `part` of a wave, and the steps that leave them."""

    def __init__(
        self,
        wave: Wave,
        tables: _Tables,
        part: slice,
        x_t: Tensor,
        source: Source,
        backend: str | None,
    ):
        self.wave, self.tables, self.part, self.x_t = wave, tables, part, x_t
        self.source, self.backend, self.prompts = source, backend, len(source.prompt_id)
        row = torch.arange(part.start, part.stop)
        self.node, self.prompt = row // self.prompts, row % self.prompts

    def ask(self, velocity: Velocity, guidance: Guidance | None) -> None:
        """The velocity of all rows, and with guidance that without a prompt."""
        x_t, prompt, sigma = self.x_t, self.tables.prompt[self.part], self.tables.sigma[self.part]
        self.velocity, self.options = None, {}
        if guidance is None:
            self.velocity = velocity(x_t, sigma, prompt)
            return
        both = torch.cat([prompt, torch.full_like(prompt, guidance.uncond)])
        v = velocity(torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both)
        self.velocity, uncond = v.chunk(2)
        self.options = {"velocity_uncond": uncond, "guidance_scale": guidance.scale}

    def record(self, velocity: Tensor | None, memory: Tensor) -> None:
        """Put aside the velocities that training needs and the predictions that steps need."""
        if velocity is not None:
            self._put(velocity, self.wave.origin, lambda: guided(self.velocity, **self.options))
        if len(memory):
            self._put(memory, self.wave.memory, self._clean)

    def _clean(self) -> Tensor:
        return self._step(slice(None), Coefficients(self.tables.to_clean[self.part]))

    def _put(self, target: Tensor, places: Tensor, value: Callable[[], Tensor]) -> None:
        place = places[self.node]
        here = (place >= 0).nonzero().flatten()
        if len(here):
            rows = place[here] * self.prompts + self.prompt[here]
            target.flatten(0, 1)[self._index(rows)] = value()[self._index(here)]

    def go(self, which: int, memory: list[Tensor], x_next: Tensor) -> None:
        """Walk the edges of a launch that leave these rows, into x_next (W, P, *D)."""
        launch, (table, ids) = self.wave.launches[which], self.tables.launches[which]
        edge, prompt, row = launch.within(self.part, self.prompts)
        if not len(edge):
            return
        options: dict[str, Any] = {}
        if launch.history:
            options["history"] = [
                earlier.flatten(0, 1)[self._index(places[edge] * self.prompts + prompt)]
                for places, earlier in zip(launch.history, memory, strict=False)
            ]
        entry = self._index(edge * self.prompts + prompt)
        if ids is not None:
            options |= {"seed": self.source.seed, "sample_id": ids[entry], "step": self.wave.depth}
        target = self._index(launch.child[edge] * self.prompts + prompt)
        coefficients = Coefficients(table[entry], launch.table.num_history)
        x_next.flatten(0, 1)[target] = self._step(self._index(row), coefficients, **options)

    def _step(self, rows: slice | Tensor, coefficients: Coefficients, **options) -> Tensor:
        options |= {"out_dtype": self.source.dtype, "backend": self.backend}
        for name, value in self.options.items():
            options[name] = value[rows] if isinstance(value, Tensor) else value
        inputs = (self.x_t[rows], self.velocity[rows], coefficients)
        return (
            sde_step(*inputs, **options)[0] if "seed" in options else ode_step(*inputs, **options)
        )

    def _index(self, index: Tensor) -> slice | Tensor:
        """Rows that follow each other as a slice, which copies nothing."""
        first = int(index[0])
        if torch.equal(index, torch.arange(first, first + len(index))):
            return slice(first, first + len(index))
        return moved(index, self.x_t.device)


def moved(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """From the host; converted there, so that the copy waits for nothing on the device."""
    return value.to(dtype or value.dtype).to(device, non_blocking=True)


def guided(velocity: Tensor, velocity_uncond: Tensor | None = None, guidance_scale: float = 1.0):
    """The velocity with guidance, in the precision of the step kernel."""
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    return reference.guided(velocity, velocity_uncond, guidance_scale, dtype)
