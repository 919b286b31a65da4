"""Low-rank adapters: added through peft, stored for both peft and diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from flowkern.train.config import LoraConfig

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's; diffusers' keys begin at the network itself


def add_lora(model: Any, config: LoraConfig) -> PeftModel:
    """Adapt the model's network, and freeze all else; the update starts at exactly zero."""
    adapter = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        init_lora_weights="gaussian",
    )
    model.network = get_peft_model(model.network, adapter).eval()
    return model.network


def save_lora(network: PeftModel, pipeline: Any, directory: Path) -> None:
    """Write the adapter for `PeftModel.from_pretrained` and for the pipeline's `load_lora_weights`.

    The network's own save_pretrained would write keys that neither reads.
    """
    adapter = network.peft_config["default"]
    weights = {
        key: value.detach().cpu().contiguous()
        for key, value in get_peft_model_state_dict(network).items()
    }
    adapter.save_pretrained(directory)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    type(pipeline).save_lora_weights(
        directory,
        transformer_lora_layers={key.removeprefix(_PREFIX): w for key, w in weights.items()},
        transformer_lora_adapter_metadata=adapter.to_dict(),  # holds alpha
    )


def restore_lora(network: PeftModel, directory: Path) -> None:
    """Load the weights that `save_lora` wrote into a network that has the adapter already."""
    loaded = set_peft_model_state_dict(network, load_file(directory / WEIGHTS))
    if loaded.unexpected_keys:
        raise ValueError(
            f"{directory / WEIGHTS}: holds {loaded.unexpected_keys[0]!r}, which "
            "lora.target_modules does not name; expected the adapter of this configuration"
        )


def attach_lora(model: Any, config: LoraConfig, directory: Path) -> None:
    """Give a model the adapter of a checkpoint, for sampling.

    Made of the run's own numbers: peft's loader imports a module that adapter_config.json names.
    """
    restore_lora(add_lora(model, config), directory)
