"""Noise from the generator of whoever calls: peers' random streams stay what they are."""

from __future__ import annotations

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Normals as diffusers draws them: on the generator's device; a list has one per sample."""
    if isinstance(generator, list) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, list):
        if len(generator) != len(x):
            raise ValueError(
                f"generator: expected one for each of {len(x)} samples, got {len(generator)}"
            )
        return torch.cat([randn_like(x[i : i + 1], one) for i, one in enumerate(generator)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def drawn_unless(x_next: Tensor | None, x: Tensor, generator: Generators = None) -> Tensor | None:
    """`randn_like(x, generator)`, or None where there is an x_next to replay: either, not both."""
    refuse_both(x_next, generator)
    return randn_like(x, generator) if x_next is None else None


def refuse_both(x_next: Tensor | None, generator: Generators) -> None:
    if x_next is not None and generator is not None:
        raise ValueError("generator: prev_sample is given, so nothing is drawn; expected one alone")
