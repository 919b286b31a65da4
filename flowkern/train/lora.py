"""Low-rank adapters, as configured; a model writes and reads their files itself."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model

from flowkern.checks import ConfigError
from flowkern.models import Model
from flowkern.train.config import LoraConfig


def add_lora(model: Model, config: LoraConfig) -> PeftModel:
    """Adapt the model's network, and freeze all else; the update starts at exactly zero.

    Raises ConfigError where the network has none of the layers, or one that cannot be adapted.
    """
    adapter = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules or model.lora_targets,
        init_lora_weights="gaussian",
    )
    try:
        model.network = get_peft_model(model.network, adapter).eval()
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())}") from error
    return model.network


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
