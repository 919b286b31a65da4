"""Images of what was learned, and of the model that it was learned from, of the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowkern.models import Model
from flowkern.rollout import prompt_ids
from flowkern.train.trained import Blend
from flowkern.train.validation import SAMPLE_ITERATION, Sampler, sample_images


@dataclass(frozen=True)
class Asked:
    """Images of every prompt: of every seed so many, one after another."""

    prompts: Sequence[str]
    sampler: Sampler
    seeds: Sequence[int] = (0,)
    num_images: int = 1
    strength: float = 1.0
    """Of what was learned."""
    trained_steps: int | None = None
    """The first steps, which what was learned draws, and the base model the rest; None: all."""
    max_batch: int = 16

    @property
    def base(self) -> Asked:
        """The same by the base model alone."""
        return replace(self, strength=0.0, trained_steps=None)

    @property
    def each(self) -> int:
        """Images of a prompt."""
        return len(self.seeds) * self.num_images


def draw(model: Model, blend: Blend, asked: Asked, device: torch.device) -> Tensor:
    """(prompts * seeds * num_images, 3, H, W) in [0, 1], or videos, on the host. The noise of an
    image follows from its prompt's place, its seed and its number."""
    prompts = [prompt for prompt in asked.prompts for _ in range(asked.num_images)]
    members = torch.arange(asked.num_images).repeat(len(asked.prompts))
    places = torch.arange(len(asked.prompts)).repeat_interleave(asked.num_images)
    ids = (prompt_ids(SAMPLE_ITERATION, places) + members).to(device)
    last = _last_level(model, asked)

    def at(sigma: float) -> None:
        blend.set(asked.strength if sigma > last else 0.0)

    options = {"max_batch": asked.max_batch, "at": at}
    drawn = [
        sample_images(model, prompts, ids, asked.sampler, seed=seed, **options).cpu()
        for seed in asked.seeds
    ]
    count = (len(asked.prompts), asked.num_images)
    return torch.stack([one.unflatten(0, count) for one in drawn], 1).flatten(0, 2)


def _last_level(model: Model, asked: Asked) -> float:
    """A noise level between those of the last trained step and of the first that is not."""
    if asked.trained_steps is None:
        return -1.0
    levels = model.sigmas(asked.sampler.num_inference_steps).tolist()
    return sum(levels[asked.trained_steps - 1 :][:2]) / 2
