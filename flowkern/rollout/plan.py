"""The plan of a rollout: which edges every sample walks, and which of them are trained.

A plan is made by a recipe, once per rollout, on the host. S edges, S + 1 nodes; edge i goes from
node i to node i + 1, from sigmas[i] down to sigmas[i + 1]. A node takes one network call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowkern.schedules import Coefficients


@dataclass(frozen=True)
class Chain:
    """One path per sample through a grid of noise levels."""

    sigmas: Tensor
    """(S + 1,) float64, falling."""
    coefficients: Coefficients
    """(S,) rows, one per edge, on the host."""
    trained: Sequence[int] = ()
    """The edges whose draw is trained, rising."""
    has_kl: bool = False
    """Is a KL to the reference taken at the trained edges?"""
    is_noisy: tuple[bool, ...] = field(init=False)
    """Per edge: does it draw noise? Known here, so that nobody asks the device."""

    def __post_init__(self) -> None:
        steps, trained = len(self.coefficients), tuple(self.trained)
        if self.sigmas.shape != (steps + 1,):
            raise ValueError(
                f"sigmas: got shape {tuple(self.sigmas.shape)}, expected ({steps + 1},), one more "
                f"than the {steps} edges of coefficients"
            )
        if list(trained) != sorted(set(trained)) or any(not 0 <= e < steps for e in trained):
            raise ValueError(f"trained: got {trained}, expected rising edges from 0 to {steps - 1}")
        is_noisy = tuple((self.coefficients.std > 0).tolist())
        has_ratio = (self.coefficients.k > 0).tolist()
        silent = [edge for edge in trained if not has_ratio[edge]]
        if silent:
            raise ValueError(f"trained: got edges {silent} with k = 0, whose ratio is always 1")
        silent = [edge for edge in trained if not is_noisy[edge]]
        if silent and self.has_kl:
            raise ValueError(f"trained: got edges {silent} with std = 0, which have no KL")
        object.__setattr__(self, "trained", trained)
        object.__setattr__(self, "is_noisy", is_noisy)

    def __len__(self) -> int:
        """The number of edges."""
        return len(self.coefficients)

    @property
    def kept(self) -> tuple[int, ...]:
        """The nodes that training needs: both ends of every trained edge, rising."""
        return tuple(sorted({node for edge in self.trained for node in (edge, edge + 1)}))

    @property
    def position(self) -> Tensor:
        """(E,): where the start of each trained edge is in `kept`; its end is the next one."""
        return torch.tensor([self.kept.index(edge) for edge in self.trained], dtype=torch.int64)
