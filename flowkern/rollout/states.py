"""The states of a rollout: what they are drawn from, and what sampling leaves of them for training.

P prompts, *D one latent; L leaves of a plan, K kept nodes, O origins of trained edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from flowkern.rollout.deal import Deal
from flowkern.rollout.layout import Edges, Layout, Wave
from flowkern.rollout.plan import Plan

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
    """(P,) int64, from `prompt_ids`."""
    shape: tuple[int, ...]
    """*D."""
    dtype: torch.dtype = torch.float32
    """Of the states."""
    first: int = 0
    """The velocity function is asked for prompts `first` to first + P - 1."""

    @property
    def precision(self) -> torch.dtype:
        """Of noise levels, coefficients and advantages."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.prompt_id)

    def block(self, part: slice) -> Source:
        """Of these prompts alone."""
        return replace(self, prompt_id=self.prompt_id[part], first=self.first + part.start)

    def empty(self, *counts: int, dtype: torch.dtype | None = None) -> Tensor:
        """States to be written, (*counts, *D); dtype: if another than theirs."""
        device = self.prompt_id.device
        return torch.empty(*counts, *self.shape, dtype=dtype or self.dtype, device=device)


class OnHost(NamedTuple):
    """Where rows are asked, known on the host: for what chooses by it and is not to wait for the
    device.
    """

    sigma: list[float]
    """Of B rows."""
    prompt: list[int]

    def without_prompt(self, uncond: int) -> OnHost:
        """The same rows without a prompt, for which `uncond` stands."""
        return OnHost(self.sigma, [uncond] * len(self.prompt))

    def twice(self, uncond: int) -> OnHost:
        """The rows, and once more without a prompt."""
        return OnHost(self.sigma + self.sigma, self.prompt + [uncond] * len(self.prompt))


@dataclass(eq=False)
class Rollout:
    """What sampling leaves behind, as `run` fills it: the leaves, and what training needs of the
    way there.
    """

    deal: Deal
    """The plans, laid out once, and which of them each prompt has."""
    source: Source
    backend: str | None
    """Of the step kernels that drew it."""
    is_redrawn: bool
    """Is x_next drawn again from its seed, with `velocity`, where training needs it?"""
    states: Tensor
    """(K, P, *D): nodes that trained edges leave, and those they lead to unless drawn again."""
    velocity: Tensor | None
    """(O, P, *D): guided, at the plan's origins, of the weights that sampled, in the precision of
    the step kernel; None unless kept."""
    latents: Tensor | None = None
    """(P, L, *D): the leaves; None: not there yet, or scored, and nothing else asks for them."""
    uncond: Tensor | None = None
    """(O, some P, *D): without a prompt, at the plan's origins of the first prompts, as the network
    gave it; None unless kept."""
    copied: torch.cuda.Event | None = None
    """When what is on the host has come there."""

    @classmethod
    def empty(
        cls, layout: Layout, source: Source, keep_velocity: bool, backend: str | None
    ) -> Rollout:
        """What will be left behind, with room for what has to be there from the first wave on."""
        prompts, trained = source.prompts, layout.trained
        origins, ends = layout.origins, trained.ends if isinstance(trained, Edges) else ()
        kept = {*origins, *ends}
        # A velocity per origin and a seed, in place of the states of many siblings.
        is_redrawn = source.dtype == torch.float32 and 2 * len(origins) < len(kept)
        velocity = None
        if is_redrawn or keep_velocity:
            velocity = source.empty(len(origins), prompts, dtype=source.precision)
        return cls(
            Deal.one(layout, prompts),
            source,
            backend,
            is_redrawn=is_redrawn,
            states=source.empty(len(origins if is_redrawn else kept), prompts),
            velocity=velocity,
        )

    @property
    def layout(self) -> Layout:
        """The first, which has the form of all."""
        return self.deal.layouts[0]

    @property
    def plan(self) -> Plan:
        return self.layout.plan

    @cached_property
    def kept(self) -> dict[int, int]:
        """Node of the first plan -> its place in `states`, which is that of its like in all."""
        plan = self.plan
        nodes = plan.origins if self.is_redrawn else {*plan.origins, *plan.trained}
        return {node: place for place, node in enumerate(sorted(nodes))}

    def record(self, wave: Wave, x: Tensor) -> None:
        """Put aside the leaves, and what training needs, of a wave's states (W, P, *D)."""
        leaves = self.plan.leaves
        for position, node in enumerate(wave.nodes):
            if node in leaves:
                if self.latents is None:
                    self.latents = self.source.empty(self.source.prompts, len(leaves))
                self.latents[:, leaves[node]] = x[position]
            if node in self.kept:
                self.states[self.kept[node]] = x[position]

    # ---- by blocks of prompts ----

    def taught(self) -> Rollout:
        """Without the leaves, where no point is matched over them."""
        return replace(self, latents=None) if isinstance(self.layout.trained, Edges) else self

    def room(self, deal: Deal, source: Source, keep_uncond: int, on_host: bool) -> Rollout:
        """Room for all prompts of `source`, of which this rollout has a block."""
        is_pinned = on_host and source.prompt_id.device.type == "cuda"
        device = torch.device("cpu") if on_host else source.prompt_id.device

        def room(value: Tensor | None, axis: int, prompts: int = source.prompts) -> Tensor | None:
            if value is None:
                return None
            shape = [*value.shape[:axis], prompts, *value.shape[axis + 1 :]]
            return torch.empty(shape, dtype=value.dtype, device=device, pin_memory=is_pinned)

        return replace(
            self,
            deal=deal,
            source=source,
            latents=room(self.latents, 0),
            states=room(self.states, 1),
            velocity=room(self.velocity, 1),
            uncond=room(self.uncond, 1, keep_uncond),
            copied=torch.cuda.Event() if is_pinned else None,
        )

    def put(self, part: Rollout) -> None:
        """Copy a block into its place; the host does not wait for it."""
        for mine, theirs in self._places(part):
            mine.copy_(theirs, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def _places(self, part: Rollout) -> Iterator[tuple[Tensor, Tensor]]:
        """Contiguous places here, and what a block has for them."""
        first = part.source.first - self.source.first
        block = slice(first, first + part.source.prompts)
        if self.latents is not None:
            yield self.latents[block], part.latents
        for mine, theirs in (
            (self.states, part.states),
            (self.velocity, part.velocity),
            (self.uncond, part.uncond),
        ):
            if mine is not None and theirs is not None:
                yield from zip(mine[:, block], theirs, strict=True)

    def wait(self) -> None:
        """Until everything that is on the host has come there."""
        if self.copied is not None:
            self.copied.synchronize()
