"""A rollout by blocks of prompts: what one block takes bounds what is on the device at a time.

P prompts, *D one latent; L leaves of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowkern.rollout.deal import Deal
from flowkern.rollout.engine import slices
from flowkern.rollout.layout import Layout
from flowkern.rollout.states import Rollout, Source

WAITS = 2**21
"""Bytes of a latent beyond which what training needs of it waits on the host, also without blocks:
an image of 1024 x 1024 has 1 MiB of them or 2, and a video of 33 frames in 480p 3.6."""


def is_large(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> bool:
    """Has such a latent more than `WAITS` bytes?"""
    return math.prod(shape) * dtype.itemsize > WAITS


@dataclass
class Blocks:
    """A rollout under way. Iterated over, it samples block after block and gives the first prompt
    and the leaves (prompts, L, *D) of each, for rewards; whoever drops them frees them. What
    training needs is left in `rollout`.
    """

    walk: Callable[[Layout, Source], Rollout]
    """Samples the prompts of a source, as `run` does."""
    source: Source
    """Of all P prompts."""
    deal: Deal
    """A block is of one plan."""
    size: int | None
    """Prompts of a block, at most; what training needs of them then waits on the host. None: all,
    and it stays on the device up to `WAITS`."""
    keep_uncond: int = 0
    """As in `run`, of all P prompts."""
    rollout: Rollout | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for layout, block in self.parts():
            found = self.walk(layout, self.source.block(block))
            leaves, found = found.latents, found.taught()
            self._keep(found)
            del found
            yield block.start, leaves
            del leaves

    def parts(self) -> Iterator[tuple[Layout, slice]]:
        """The plan and the prompts of each block, in order."""
        for layout, run in self.deal.runs():
            count = run.stop - run.start
            for part in slices(count, self.size or count):
                yield layout, slice(run.start + part.start, run.start + part.stop)

    @property
    def leaves(self) -> int:
        """L."""
        return len(self.deal.layouts[0].plan.leaves)

    @property
    def waits(self) -> bool:
        """Does what training needs wait on the host, and come back batch by batch?"""
        source = self.source
        is_elsewhere = source.prompt_id.device.type != "cpu"
        return self.size is not None or (is_elsewhere and is_large(source.shape, source.dtype))

    def _keep(self, found: Rollout) -> None:
        if not self.waits and found.source.prompts == self.source.prompts:
            self.rollout = replace(found, deal=self.deal)  # there is no other block
            return
        if self.rollout is None:
            self.rollout = found.room(self.deal, self.source, self.keep_uncond, self.waits)
        self.rollout.put(found)
