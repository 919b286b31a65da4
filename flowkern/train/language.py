"""The language model of a planner: loaded, adapted, saved and loaded again as Hugging Face does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowkern.checks import ConfigError
from flowkern.train.config import LoraConfig
from flowkern.train.planner_config import PlannerConfig

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER = "adapter_model.safetensors"


def load_language(config: PlannerConfig, device: torch.device) -> tuple[nn.Module, Any, str]:
    """The network, adapted as configured, its tokenizer, and what of it is trained, in a line.

    Weights that are trained are in float32, others in train.mixed_precision.
    Raises ConfigError, naming the key, for what is no such model, and layers that cannot be
    adapted.
    """
    options, lora = config.model, config.lora
    dtype = torch.float32 if lora is None else DTYPES[config.train.mixed_precision]
    where = {"revision": options.revision, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            options.path, **where, dtype=dtype, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(options.path, **where)
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"model.path: {options.path!r} is no language model that can be loaded: {said:.300}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path: the tokenizer of {options.path!r} has no end-of-text token")
    model = model.to(device).eval()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # what it asks for
    where = ", all of the network, in float32"
    if lora is not None:
        model = _adapted(model, lora)
        where = f", of rank {lora.rank}"
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, tokenizer, f"trains {weights:,} weights{where}"


def _adapted(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """By default all linear layers but the head."""
    adapter = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules or "all-linear",
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapter).eval()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())}") from error


def stop_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """What ends a turn: the tokenizer's end of text, and what the model's own settings add."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return frozenset(i for i in (tokenizer.eos_token_id, *own) if i is not None)


def save_language(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """A model that transformers loads, or an adapter that peft does, with the tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def load_language_weights(model: nn.Module, directory: Path) -> None:
    """Give the model what `save_language` wrote. Raises ConfigError where it is of another
    configuration."""
    if hasattr(model, "peft_config"):
        if not (directory / ADAPTER).is_file():
            raise ConfigError(f"lora: {str(directory)!r} has no {ADAPTER}")
        found = set_peft_model_state_dict(model, load_file(directory / ADAPTER))
        missing, strange = [n for n in found.missing_keys if "lora_" in n], found.unexpected_keys
    else:
        tensors = {
            name: tensor
            for path in sorted(directory.glob("model*.safetensors"))
            for name, tensor in load_file(path).items()
        }
        found = model.load_state_dict(tensors, strict=False)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        missing = [name for name in found.missing_keys if name not in tied]
        strange = found.unexpected_keys
    if missing or strange:
        raise ConfigError(
            f"lora: {str(directory)!r} holds other weights than this configuration's: "
            f"{[*missing, *strange][0]}"
        )
