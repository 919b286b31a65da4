"""Low-rank adapters, as configured; a model writes and reads their files itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from flowkern.checks import ConfigError, shown
from flowkern.models import Model
from flowkern.train.config import LoraConfig


def add_lora(model: Model, config: LoraConfig) -> PeftModel:
    """Adapt the model's network, and freeze all else; the update starts at exactly zero. Layers
    whose results nothing reads are left out.

    Raises ConfigError for a target that is none of the network's layers, or cannot be adapted.
    """
    targets = config.target_modules or model.lora_targets
    found = hits(model, targets)
    for target, names in found.items():
        if not names:
            raise ConfigError(f"lora.target_modules: {shown(target)} is no layer of this network")
    left_out = found != _found(model, targets)
    adapter = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        exclude_modules=_unread(model) if left_out else None,
        init_lora_weights="gaussian",
    )
    kinds = {name: type(module) for name, module in model.network.named_modules()}
    try:
        model.network = get_peft_model(model.network, adapter).eval()
    except (ValueError, TypeError) as error:
        message = " ".join(str(error).split())  # peft's shows modules with all that is in them
        others = [(t, n) for t in found for n in found[t] if kinds[n] is not nn.Linear]
        for target, name in others[:1]:
            where = name or "the network"
            message = (
                f"{shown(target)} is also {where}, a {kinds[name].__name__}; expected linear ones"
            )
        raise ConfigError(f"lora.target_modules: {message:.500}") from error
    return model.network


def hits(model: Model, targets: str | Sequence[str]) -> dict[str, list[str]]:
    """The network's layers that each target is, as peft finds them, less those that nothing reads.

    Raises ConfigError for a pattern that is none.
    """
    unread = _unread(model)
    return {
        target: [name for name in names if not re.fullmatch(unread, name)]
        for target, names in _found(model, targets).items()
    }


def layers(model: Model, config: LoraConfig) -> tuple[int, dict[str, int]]:
    """How many layers are adapted, in all and by target; by the ends of their names where a pattern
    is the target. Of a network that `add_lora` adapted.
    """
    adapted = [
        name.removeprefix("base_model.model.")
        for name, layer in model.network.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    targets = config.target_modules or model.lora_targets
    if isinstance(targets, str):
        targets = sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in adapted})
    counts = {end: sum(f".{name}".endswith(f".{end}") for name in adapted) for end in targets}
    return len(adapted), counts


def _found(model: Model, targets: str | Sequence[str]) -> dict[str, list[str]]:
    names = [name for name, _ in model.network.named_modules()]
    if not isinstance(targets, str):
        return {end: [n for n in names if f".{n}".endswith(f".{end}")] for end in targets}
    try:
        return {targets: [name for name in names if re.fullmatch(targets, name)]}
    except re.error as error:
        raise ConfigError(f"lora.target_modules: got {shown(targets)}, {error}") from None


def _unread(model: Model) -> str:
    """A pattern of the modules that nothing reads, with all that is in them."""
    return "|".join(rf"{re.escape(name)}(\..*)?" for name in model.unread)


def restore_lora(model: Model, directory: Path) -> None:
    """Load the weights of a checkpoint into the adapter that the model has.

    Raises ConfigError where they are not those of the configuration's adapter.
    """
    try:
        model.load_lora(directory)
    except ValueError as error:
        raise ConfigError(f"lora.{error}") from error
