"""Models: one adapter per family over a diffusers pipeline directory. Protocol and lookup here.

An adapter is what a sampler and a trainer need of a pipeline: encode prompts, lay out noise levels,
predict a velocity, decode latents. B samples, L text tokens, D latent elements per sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowkern.lookup import load
from flowkern.models.pipeline import read_index

__all__ = ["MODELS", "Conditioning", "Model", "load_model", "pipeline_class"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, one row each; ``conditioning[index]`` picks, repeats or reorders rows."""

    tokens: Tensor
    """(B, L, E): the text tokens the network attends to."""
    pooled: Tensor
    """(B, P): one vector per prompt."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Tensor | slice | list[int]) -> "Conditioning":
        """The rows of an index tensor (int64 or bool), a slice or a list."""
        return Conditioning(self.tokens[index], self.pooled[index])

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """The rows of all parts, in order; their L must agree."""
        return Conditioning(
            torch.cat([part.tokens for part in parts]), torch.cat([part.pooled for part in parts])
        )


class Model(Protocol):
    """What every adapter offers; `flowkern.models.sd3.SD3` documents the parts."""

    network: nn.Module
    rows: int

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def latent_shape(
        self, height: int | None = None, width: int | None = None
    ) -> tuple[int, ...]: ...

    def sigmas(self, num_steps: int) -> Tensor: ...

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


MODELS = {"StableDiffusion3Pipeline": "flowkern.models.sd3:SD3"}
"""The adapter of each diffusers pipeline class; imported only when a directory asks for it."""


def pipeline_class(path: str | Path) -> str:
    """The class named in a pipeline directory's model_index.json.

    Raises FileNotFoundError where there is no such file and ValueError where it names no class.
    """
    return read_index(path)["_class_name"]


def load_model(path: str | Path, **options: Any) -> Model:
    """The adapter for a pipeline directory, by the class its model_index.json names.

    `options` go to the adapter's ``from_pretrained``: dtype, device and what the family has.
    Raises FileNotFoundError for no pipeline directory, ValueError for a class without an adapter.
    """
    name = pipeline_class(path)
    if name not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise ValueError(f"path: {str(path)!r} is a {name}; expected one of {known}")
    return load(name, MODELS).from_pretrained(path, **options)
