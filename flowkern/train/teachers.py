"""Copies of the weights that a recipe has from checkpoints, and not from its own run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from flowkern.checks import ConfigError
from flowkern.train.checkpoint import MANIFEST, broken
from flowkern.train.config import Config

if TYPE_CHECKING:
    from flowkern.train.loop import Loop

WANTED = "a folder checkpoint-N of a run, its ema, or what `flowkern export` wrote of one"


def places(config: Config) -> dict[str, tuple[str, Path]]:
    """Of every such copy the option that names it, and its folder.

    Raises ConfigError, naming the option, where there is none, a broken one, or an adapter of
    another strength.
    """
    found = {}
    for copy, option in config.algorithm.read_from.items():
        key, place = f"algorithm.{option}", getattr(config.algorithm, option)
        if place is None:
            raise ConfigError(f"{key}: got null, expected {WANTED}")
        directory = Path(place)
        if not directory.is_dir():
            raise ConfigError(f"{key}: there is no folder {place!r}; expected {WANTED}")
        if (directory / MANIFEST).is_file() and (fault := broken(directory)):
            raise ConfigError(f"{key}: {place!r} is broken: {fault}")
        if config.lora is not None:
            _require_strength(key, directory, config.lora.alpha)
        found[copy] = key, directory
    return found


def _require_strength(key: str, directory: Path, alpha: float) -> None:
    """No tensor says it."""
    path = directory / "adapter_config.json"
    try:
        said = json.loads(path.read_bytes())
        alphas = {said["lora_alpha"], *(said.get("alpha_pattern") or {}).values()}
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(
            f"{key}: {str(directory)!r} has no adapter (adapter_config.json); expected {WANTED}"
        ) from None
    if alphas != {alpha} or said.get("use_rslora"):
        found = f"lora_alpha {', '.join(map(str, alphas))}"
        found += " and use_rslora" if said.get("use_rslora") else ""
        raise ConfigError(f"{key}: {str(path)!r} has {found}, expected lora.alpha, {alpha}")


def read_copies(loop: Loop, found: Mapping[str, tuple[str, Path]]) -> None:
    """Fill these copies. Raises ConfigError, naming the option, for weights of another shape."""
    for copy, (key, directory) in found.items():
        try:
            loop.copies.fill(copy, partial(loop.task.load, directory))
        except (ConfigError, OSError, SafetensorError) as error:
            raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
