"""A network's repeated blocks as configured: by which attention, quantized, compiled, and tried
before they learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from math import isfinite

import torch
from torch import Tensor

from flowkern import torch_private as private
from flowkern.checks import ConfigError, counted
from flowkern.models import Model, quantize
from flowkern.models.compiled import Compiled
from flowkern.train.attention import of_attention, set_attention
from flowkern.train.config import Config, ModelConfig

TRIED = ("compile", "quantization", "attention_backend")


def set_blocks(model: Model, config: Config, device: torch.device) -> list[str]:
    """Quantize, choose the attention of and compile the blocks of a network that has its adapter,
    and that `load_pipeline` loaded; returns what was done, in lines.

    Raises ConfigError for what this network or this device does not have.
    """
    facts, options = [], config.model
    if options.quantization is not None:
        facts.append(_quantized(model, options.quantization, device))
    if (name := options.attention_backend) is not None:
        facts.append(set_attention(model, name, config.train.mixed_precision, device))
    if options.compile:
        if model.guidance.boundary:
            raise ConfigError(
                "model.compile: got True, but there are two networks, which are asked for parts of "
                "the rows"
            )
        model.compiled = Compiled(_blocks(model, "compile", True), config.train.max_batch)
    return facts


def require_quantization(config: Config, device: torch.device | None) -> None:
    """Raise ConfigError for one that full weights, this device or this installation do not have;
    without a device, for one that full weights do not have anywhere."""
    key, kind = "model.quantization", config.model.quantization
    if kind is None:
        return
    if config.lora is None:
        raise ConfigError(f"{key}: got {kind}, but lora is null: no weight is frozen")
    if device is None:
        return
    if kind == "float8" and not quantize.has_products(device):
        raise ConfigError(
            f"{key}: got {kind}, but {device.type} multiplies no float8; expected CUDA of compute "
            "capability 8.9"
        )
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{key}: got {kind}, which takes bitsandbytes: pip install 'flowkern[quantization]'"
        )


def _quantized(model: Model, kind: str, device: torch.device) -> str:
    # After the adapter: peft's layer for a linear one calls whatever its base is by then. Before it
    # peft would choose a layer by the library that quantized, and there is none of it here.
    network, blocks = model.network, _blocks(model, "quantization", kind)
    before = quantize.frozen_bytes(network)
    try:
        count = quantize.quantize(blocks, kind, device)
    except ValueError as error:
        raise ConfigError(f"model.quantization: got {kind}, but {error}") from error
    network.to(device)
    after = quantize.frozen_bytes(network)
    return (
        f"{count} frozen layers in {kind}: what is frozen of the network takes {after / 1e6:,.2f} "
        f"MB, {before / 1e6:,.2f} before"
    )


def _blocks(model: Model, key: str, value: object) -> list[torch.nn.Module]:
    try:
        return model.repeated()
    except ValueError as error:
        name = type(model).__name__
        raise ConfigError(f"model.{key}: got {value}, but of {name} {error}") from None


def is_tried(options: ModelConfig) -> bool:
    """Is anything of the blocks other than diffusers has it?"""
    return any(getattr(options, name) for name in TRIED)


def try_blocks(model: Model, config: Config, device: torch.device) -> list[str]:
    """Ask for the velocity of train.max_batch rows, without a gradient and with one; returns what
    was compiled meanwhile, in lines.

    Raises ConfigError where they are no numbers, where the two are not the same, which would make
    the first ratio another than 1, or where no gradient arrives.
    """
    options, compiled = config.model, model.compiled
    given = {name: getattr(options, name) for name in TRIED}
    key = " or ".join(f"model.{name}" for name, value in given.items() if value)
    try:
        with of_attention(options.attention_backend):
            off, size = asked_twice(model, config.train.max_batch, device)
    except Exception as error:
        if not private.is_of_compiler(error):
            raise
        raise ConfigError(f"model.compile: {' '.join(str(error).split())[:300]}") from error
    if not isfinite(off):
        raise ConfigError(
            f"{key}: the network's velocity is not finite; expected weights of numbers "
            "(model.path), and a train.mixed_precision that holds what the network computes"
        )
    if off != 0:
        raise ConfigError(
            f"{key}: the network says otherwise with a gradient than without, by {off:.3g}: the "
            "first ratio would not be 1"
        )
    if not 0 < size < float("inf"):
        raise ConfigError(f"{key}: the network's gradient has the norm {size}")
    if compiled is None:
        return []
    counts = (len(compiled.blocks), "block"), (compiled.graphs, "graph"), (compiled.rows, "row")
    blocks, graphs, rows = (counted(*one) for one in counts)
    return [f"compiled {blocks}, {graphs}, for {rows} in {compiled.seconds:.0f} s"]


def asked_twice(model: Model, rows: int, device: torch.device) -> tuple[float, float]:
    """The largest difference of the velocity without a gradient and with one, of so many rows; the
    norm of that gradient."""
    ask = asking(model, rows, device)
    with torch.no_grad():
        alone = ask()
    with torch.enable_grad():
        velocity = ask()
        weights = [p for p in model.network.parameters() if p.requires_grad]
        found = torch.autograd.grad(velocity.float().square().sum(), weights, allow_unused=True)
    off = (alone - velocity).abs().max().item()
    return off, torch.stack([g.float().norm() for g in found if g is not None]).norm().item()


def asking(model: Model, rows: int, device: torch.device) -> Callable[[], Tensor]:
    """What asks for a velocity of so many rows: drawn states, levels from 1 down, no prompt."""
    conditioning = model.encode([model.guidance.negative_prompt]).to(device)
    places = torch.zeros(rows, dtype=torch.int64)
    given = conditioning.rows(places.to(device), places)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(rows, *model.latent_shape, generator=generator).to(device)
    sigma = torch.linspace(1, 0.1, rows)
    return partial(model.velocity, x_t, sigma.to(device), given, sigma_host=sigma.tolist())
