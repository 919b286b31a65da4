"""Images of what was learned, and of the model that it was learned from, of the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from flowkern.lookup import is_hub_id, load
from flowkern.models import MODELS, Model
from flowkern.models.directory import INDEX, read_index
from flowkern.rollout import prompt_ids
from flowkern.train.model_config import ModelConfig
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


def draws_videos(options: ModelConfig) -> bool | None:
    """By the index of a pipeline that is here; None: it is not, or cannot be read."""
    path = str(options.path)
    try:
        if is_hub_id(path):
            found = try_to_load_from_cache(path, INDEX, revision=options.revision)
            path = str(Path(found).parent) if isinstance(found, str) else path
        name = read_index(path)["_class_name"]
    except (OSError, ValueError):  # loading it says what is wrong
        return None
    return hasattr(load(name, MODELS), "frame_step") if name in MODELS else None


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
