"""Copies of the weights that a recipe has from checkpoints, and not from its own run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from flowkern.checks import ConfigError
from flowkern.train.checkpoint import MANIFEST, broken, is_of_run
from flowkern.train.config import Config

if TYPE_CHECKING:
    from flowkern.train.loop import Loop

WANTED = "a folder checkpoint-N of a run, its ema, or what `flowkern export` wrote of one"


def places(config: Config) -> dict[str, tuple[str, Path]]:
    """Of every such copy the option that names it, and its folder.

    Raises ConfigError, naming the option, where there is none, a broken one, one of the run's own,
    or an adapter of another strength.
    """
    found = {}
    for copy, option in config.algorithm.read_from.items():
        key, place = f"algorithm.{option}", getattr(config.algorithm, option)
        if place is None:
            raise ConfigError(f"{key}: got null, expected {WANTED}")
        directory = Path(place)
        if not directory.is_dir():
            raise ConfigError(f"{key}: there is no folder {place!r}; expected {WANTED}")
        if is_of_run(directory, config.output_dir):
            raise ConfigError(
                f"{key}: {place!r} is of output_dir, whose checkpoints this run replaces"
            )
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
        alphas = {said["lora_alpha"], *dict(said.get("alpha_pattern") or {}).values()}
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(
            f"{key}: {str(directory)!r} has no adapter (adapter_config.json); expected {WANTED}, "
            "without --merged"
        ) from None
    if alphas != {alpha} or said.get("use_rslora"):
        found = f"lora_alpha {', '.join(map(str, alphas))}"
        found += " and use_rslora" if said.get("use_rslora") else ""
        raise ConfigError(f"{key}: {str(path)!r} has {found}, expected lora.alpha, {alpha}")


def digests(config: Config) -> dict[str, str]:
    """Of every such option, SHA-256 of the weights that are read: a resume learns from the same."""
    options = config.algorithm.read_from.values()
    return {f"algorithm.{o}": _digest(config, Path(getattr(config.algorithm, o))) for o in options}


def _digest(config: Config, directory: Path) -> str:
    pattern = "*/*.safetensors" if config.lora is None else "adapter_model.safetensors"
    found = hashlib.sha256()
    for path in sorted(directory.glob(pattern)):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def read_copies(loop: Loop, found: Mapping[str, tuple[str, Path]]) -> None:
    """Fill these copies. Raises ConfigError, naming the option, for weights of another shape, or
    that are not finite.
    """
    for copy, (key, directory) in found.items():
        try:
            loop.copies.fill(copy, partial(loop.task.load, directory))
        except (ConfigError, OSError, SafetensorError) as error:
            said = " ".join(str(error).split())
            where = "" if str(directory) in said else f"{str(directory)!r} cannot be read: "
            raise ConfigError(f"{key}: {where}{said}") from error
        if not loop.copies.is_finite(copy):
            raise ConfigError(f"{key}: {str(directory)!r} has weights that are not finite")
