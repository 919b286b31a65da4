"""The files of a low-rank adapter: for peft, and for the pipeline's own `load_lora_weights`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's; diffusers' keys begin at the network itself


def write(
    network: PeftModel,
    pipeline: Any,
    origin: Mapping[str, Any],
    directory: Path,
    files: Mapping[str, str],
) -> None:
    """Write the adapter for `PeftModel.from_pretrained` and for the pipeline's `load_lora_weights`.

    pipeline: its class. origin: of what is adapted, as peft's configuration has it. files: those of
    the pipeline, by what the names of the layers in each begin with.
    The network's own save_pretrained would write keys that neither reads. The pipeline's file holds
    the whole strength in its tensors: what reads nothing else applies all of it, B A.
    Raises ValueError for a network without one.
    """
    adapter = copy.copy(_adapted(network).peft_config["default"])
    for name, value in origin.items():
        setattr(adapter, name, value)
    weights = {
        _plain(key): value.detach().cpu().contiguous()
        for key, value in get_peft_model_state_dict(network).items()
    }
    adapter.save_pretrained(directory)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    strength = adapter.lora_alpha / adapter.r
    plain = {
        key.removeprefix(_PREFIX): value * strength if "lora_B" in key else value
        for key, value in weights.items()
    }
    for prefix, name in files.items():
        part = {key.removeprefix(prefix): v for key, v in plain.items() if key.startswith(prefix)}
        if not part:  # nothing of this network is adapted
            continue
        metadata = adapter.to_dict() | {"lora_alpha": adapter.r}
        if prefix:  # a pattern is of the names as they were
            metadata["target_modules"] = sorted({key.rpartition(".lora_")[0] for key in part})
        pipeline.save_lora_weights(
            directory,
            transformer_lora_layers=part,
            transformer_lora_adapter_metadata=metadata,
            weight_name=name,
        )
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.iterdir():  # safetensors makes files that their owner alone can read
        path.chmod(0o666 & ~mask)


def read(network: PeftModel, directory: Path) -> None:
    """Load the weights that `write` wrote into a network that has the adapter already.

    Raises ValueError where they are another adapter's, naming the option that says so.
    """
    here = get_peft_model_state_dict(_adapted(network))
    names = {_plain(name): name for name in here}
    stored = {_plain(name): value for name, value in load_file(directory / WEIGHTS).items()}
    for name in sorted(names.keys() ^ stored.keys()):
        raise ValueError(
            f"target_modules: {directory / WEIGHTS} {'lacks' if name in names else 'holds'} "
            f"{name!r}; expected the adapter of this configuration"
        )
    for name, value in stored.items():
        if value.shape != here[names[name]].shape:
            raise ValueError(
                f"rank: {name!r} has shape {tuple(value.shape)} in {directory / WEIGHTS}, "
                f"expected {tuple(here[names[name]].shape)}"
            )
    set_peft_model_state_dict(network, {names[name]: value for name, value in stored.items()})


def _adapted(network: PeftModel) -> PeftModel:
    if not hasattr(network, "peft_config"):
        raise ValueError(f"network: got a {type(network).__name__}, expected one with an adapter")
    return network


def _plain(name: str) -> str:
    """A weight's name whether or not a part of the network is compiled."""
    return name.replace("_orig_mod.", "")
