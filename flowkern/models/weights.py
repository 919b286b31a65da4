"""A network's whole weights, as folders that diffusers reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flowkern.split import gathered, is_split, part_of


def write(parts: Mapping[str, nn.Module], directory: Path | None) -> None:
    """A folder for each, by its name, for the `from_pretrained` of its class; in its own dtype.

    Of networks that are split every process is to write; directory: None on all but one.
    """
    for name, network in parts.items():
        if any(map(is_split, network.parameters())):
            state = gathered(network.state_dict(), directory is not None)
            network = network if directory is None else _with(network, state)
        if directory is not None:
            network.save_pretrained(directory / name)


def _with(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """One of its kind, with whole weights."""
    # What splits a network makes a class of its own of it.
    kind = next(one for one in type(network).__mro__ if one.__module__.startswith("diffusers."))
    with torch.device("meta"):
        made = kind.from_config(network.config)
    made.load_state_dict(state, assign=True)
    return made


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
    target.copy_(part_of(value, target))
