"""A network's whole weights, as folders that diffusers reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn


def write(parts: Mapping[str, nn.Module], directory: Path) -> None:
    """A folder for each, by its name, for the `from_pretrained` of its class; in its own dtype."""
    for name, network in parts.items():
        network.save_pretrained(directory / name)


@torch.no_grad()
def read(parts: Mapping[str, nn.Module], directory: Path) -> None:
    """Give networks the weights that `write` wrote, rounded to their own dtype, one tensor at a
    time.

    Raises ValueError where they are another network's.
    """
    for name, network in parts.items():
        here = network.state_dict()
        missing = set(here)
        for file in sorted((directory / name).glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for key in stored.keys():
                    _copy(stored.get_tensor(key), here.get(key), f"{file}: {key}")
                    missing.discard(key)
        if missing:
            raise ValueError(f"{directory / name} lacks {min(missing)!r} of this network")


def _copy(value: Tensor, target: Tensor | None, name: str) -> None:
    if target is None or target.shape != value.shape:
        has = "none" if target is None else f"one of shape {tuple(target.shape)}"
        raise ValueError(f"{name} has shape {tuple(value.shape)}, and this network {has}")
    target.copy_(value)
