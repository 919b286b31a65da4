"""The plans of a rollout, and which of them each prompt has.

P prompts, Q plans, all of one form: S sites and C choices of each. Most recipes have one plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from flowkern.rollout.layout import Edges, Layout, Tables
from flowkern.rollout.plan import Plan


@dataclass(frozen=True, eq=False)
class Deal:
    """Batches of training mix the plans: what an edge says is looked up at `at`, in `tables`; all
    that is of a plan's form, and not of its edges, the first says for all."""

    layouts: tuple[Layout, ...]
    """(Q,): also of plans that only prompts of other processes have."""
    of: Tensor
    """(P,): which of them each prompt has, on the host."""
    sigma: Tensor = field(init=False)
    """(Q * S,): of the sites, on the host."""
    _there: dict[Any, Tables] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        sigma = torch.cat([layout.trained.sigma for layout in self.layouts])
        object.__setattr__(self, "sigma", sigma)

    @classmethod
    def dealt(cls, plans: Sequence[Plan], slots: Tensor) -> Deal:
        """Of all prompts of a rollout the plans, of which those in `slots` (P,) are dealt here."""
        number: dict[int, int] = {}
        which = [number.setdefault(id(plan), len(number)) for plan in plans]
        distinct = dict(zip(which, plans, strict=True))
        layouts = tuple(Layout(distinct[i]) for i in range(len(number)))
        return cls(layouts, torch.tensor(which)[slots])

    @classmethod
    def one(cls, layout: Layout, prompts: int) -> Deal:
        return cls((layout,), torch.zeros(prompts, dtype=torch.int64))

    def runs(self) -> Iterator[tuple[Layout, slice]]:
        """Prompts that follow each other with one plan, from the first prompt on."""
        first = 0
        for which, same in groupby(self.of.tolist()):
            count = len(list(same))
            yield self.layouts[which], slice(first, first + count)
            first += count

    def at(self, place: Tensor, prompt: Tensor, count: int) -> Tensor:
        """(R,): where `tables` have places (R,), of `count` of each plan, for prompts (R,)."""
        return self.of[prompt] * count + place

    def tables(self, device: torch.device, dtype: torch.dtype) -> Tables:
        """What training indexes, of one plan after another; moved once."""
        each = [layout.tables(device, dtype) for layout in self.layouts]
        if len(each) == 1:
            return each[0]
        if (device, dtype) not in self._there:
            names = ["sigma", "numbers"]
            names += ["table", "weight"] * isinstance(self.layouts[0].trained, Edges)
            joined = {name: torch.cat([getattr(one, name) for one in each]) for name in names}
            self._there[device, dtype] = Tables(roots=each[0].roots, waves=(), **joined)
        return self._there[device, dtype]
