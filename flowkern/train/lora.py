"""Low-rank adapters, as configured; a model writes and reads their files itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model

from flowkern.checks import ConfigError, shown
from flowkern.models import Model
from flowkern.train.config import LoraConfig


def add_lora(model: Model, config: LoraConfig) -> PeftModel:
    """Adapt the model's network, and freeze all else; the update starts at exactly zero.

    Raises ConfigError for a target that is none of the network's layers, or cannot be adapted.
    """
    targets = config.target_modules or model.lora_targets
    for target, count in hits(model, targets).items():
        if not count:
            raise ConfigError(f"lora.target_modules: {shown(target)} is no layer of this network")
    adapter = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        init_lora_weights="gaussian",
    )
    try:
        model.network = get_peft_model(model.network, adapter).eval()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())}") from error
    return model.network


def hits(model: Model, targets: str | Sequence[str]) -> dict[str, int]:
    """How many of the network's layers each target is, as peft finds them.

    Raises ConfigError for a pattern that is none.
    """
    names = [name for name, _ in model.network.named_modules()]
    if not isinstance(targets, str):
        return {end: sum(f".{name}".endswith(f".{end}") for name in names) for end in targets}
    try:
        return {targets: sum(re.fullmatch(targets, name) is not None for name in names)}
    except re.error as error:
        raise ConfigError(f"lora.target_modules: got {shown(targets)}, {error}") from None


def restore_lora(model: Model, directory: Path) -> None:
    """Load the weights of a checkpoint into the adapter that the model has.

    Raises ConfigError where they are not those of the configuration's adapter.
    """
    try:
        model.load_lora(directory)
    except ValueError as error:
        raise ConfigError(f"lora.{error}") from error


def attach_lora(model: Model, config: LoraConfig, directory: Path) -> None:
    """Give a model the adapter of a checkpoint, for sampling.

    Made of the run's own numbers: peft's loader imports a module that adapter_config.json names.
    """
    add_lora(model, config)
    restore_lora(model, directory)
