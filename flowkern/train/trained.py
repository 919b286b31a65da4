"""What of a model is trained, as configured: a low-rank adapter, or all of its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from flowkern.checks import ConfigError, counted
from flowkern.models import Model
from flowkern.train.config import LoraConfig
from flowkern.train.lora import add_lora, layers, restore_lora


def set_trained(model: Model, lora: LoraConfig | None) -> str:
    """Adapt the model's network, or (None) leave all of it to be trained but what nothing reads;
    returns what is trained, in a line.

    Raises ConfigError for layers that cannot be adapted, or weights too coarse to be trained.
    """
    if lora is not None:
        network = add_lora(model, lora)
        total, counts = layers(model, lora)
        places = ", ".join(f"{name} {count}" for name, count in counts.items())
        where = f", of rank {lora.rank} in {counted(total, 'layer')}: {places}"
    else:
        network, where = model.network, ""
        for name in model.unread:
            network.get_submodule(name).requires_grad_(False)
        for name, weight in network.named_parameters():
            if weight.dtype != torch.float32:
                dtype = str(weight.dtype).removeprefix("torch.")
                raise ConfigError(
                    f"lora: got null, which trains weights in float32, but {name} is in {dtype}"
                )
    weights = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return f"trains {weights:,} weights{where or ', all of the network, in float32'}"


def save_trained(model: Model, lora: LoraConfig | None, directory: Path | None) -> None:
    """directory: see `Task.save`."""
    if lora is None:
        model.save_network(directory)
    else:
        model.save_lora(directory)


def load_trained(model: Model, lora: LoraConfig | None, directory: Path) -> None:
    """Give the model what `save_trained` wrote, where `set_trained` made what was saved.

    Raises ConfigError where it is of another configuration.
    """
    if lora is not None:
        restore_lora(model, directory)
        return
    try:
        model.load_network(directory)
    except ValueError as error:
        raise ConfigError(f"lora: got null, but {error}") from error


def attach_trained(model: Model, lora: LoraConfig | None, directory: Path) -> None:
    """Give a model what a checkpoint learned, for sampling, in the model's own precision.

    An adapter is made of the run's own numbers: peft's loader imports a module that
    adapter_config.json names.
    """
    if lora is not None:
        add_lora(model, lora)
    load_trained(model, lora, directory)


class Blend:
    """What `attach_trained` gives, at any strength: 1 as it was learned, 0 the base, between and
    beyond by the line through both. Of whole weights a copy of each is kept on the host.
    """

    def __init__(self, model: Model, lora: LoraConfig | None, directory: Path) -> None:
        self.model, self.lora, self.strength = model, lora, 1.0
        self._base = {} if lora is not None else self._copy()
        attach_trained(model, lora, directory)
        self._learned = {} if lora is not None else self._copy()

    @torch.no_grad()
    def set(self, strength: float) -> None:
        if strength == self.strength:
            return
        self.strength = strength
        for layer in self.model.network.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_scale("default", strength)
        whole = {1.0: self._learned, 0.0: self._base}.get(strength)
        for name, base in self._base.items():
            mixed = torch.lerp(base.float(), self._learned[name].float(), strength)
            self._weights[name].copy_(mixed if whole is None else whole[name])

    def _copy(self) -> dict[str, Tensor]:
        self._weights = dict(self.model.network.named_parameters())
        return {name: weight.detach().cpu().clone() for name, weight in self._weights.items()}
