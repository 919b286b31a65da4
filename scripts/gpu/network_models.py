"""The networks that network.py times: published configurations, random weights, LoRA of rank 32.

The transformer alone, with random text in place of encoders: Stable Diffusion 3.5 medium and
FLUX.1-dev at 512 pixels, Wan 2.1 1.3B at 480 x 832 pixels and 33 frames.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from diffusers import (  # noqa: E402
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from harness import can_fork as can_fork  # noqa: E402
from large_model import MEDIUM, TINY, made, vae_of  # noqa: E402
from larger_models import FLUX_DEV, WAN_1B  # noqa: E402

from flowkern.models.attention import dense_gradients  # noqa: E402
from flowkern.models.flux import Flux  # noqa: E402
from flowkern.models.packing import positions  # noqa: E402
from flowkern.models.pipeline import attention  # noqa: E402
from flowkern.models.wan import Wan  # noqa: E402
from flowkern.train.config import LoraConfig  # noqa: E402
from flowkern.train.dry_run import dry_run_of_blocks  # noqa: E402
from flowkern.train.lora import add_lora  # noqa: E402

IS_REHEARSAL = os.environ.get("GPU_REHEARSE") == "1"


@dataclass(frozen=True)
class Family:
    kind: type[nn.Module]
    blocks: tuple[str, ...]
    """Classes of those that repeat."""
    config: dict[str, Any]
    tiny: dict[str, Any]
    """What a rehearsal has otherwise."""
    few: dict[str, Any]
    """What a network with two blocks of each sort has otherwise: what enters the first one has no
    gradient, which makes another graph."""
    rows: tuple[int, int]
    """Forward, and forward and backward."""
    targets: Callable[[dict], Any]
    inputs: Callable[[dict, int, torch.device], dict[str, Tensor]]
    """Of the network's call, B rows, with x_t as hidden_states."""


def _sd3_inputs(config: dict, rows: int, device: torch.device) -> dict[str, Tensor]:
    architecture = TINY if IS_REHEARSAL else MEDIUM
    size = architecture.options["height"] // 8
    return {
        "hidden_states": torch.randn(rows, 16, size, size, device=device),
        "timestep": torch.rand(rows, device=device) * 1000,
        "encoder_hidden_states": torch.randn(
            rows, sum(architecture.tokens), config["joint_attention_dim"], device=device
        ),
        "pooled_projections": torch.randn(rows, config["pooled_projection_dim"], device=device),
    }


def _flux_inputs(config: dict, rows: int, device: torch.device) -> dict[str, Tensor]:
    side, text = (4, 8) if IS_REHEARSAL else (32, 512)
    ids = "cpu" if device.type == "meta" else device
    return {
        "hidden_states": torch.randn(rows, side * side, config["in_channels"], device=device),
        "timestep": torch.rand(rows, device=device),
        "guidance": torch.full((rows,), 3.5, device=device),
        "encoder_hidden_states": torch.randn(
            rows, text, config["joint_attention_dim"], device=device
        ),
        "pooled_projections": torch.randn(rows, config["pooled_projection_dim"], device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
        "img_ids": positions(side, side, torch.device(ids)).to(device),
    }


def _wan_inputs(config: dict, rows: int, device: torch.device) -> dict[str, Tensor]:
    size, text = ((3, 4, 4), 8) if IS_REHEARSAL else ((9, 60, 104), 512)
    return {
        "hidden_states": torch.randn(rows, 16, *size, device=device),
        "timestep": torch.rand(rows, device=device) * 1000,
        "encoder_hidden_states": torch.randn(rows, text, config["text_dim"], device=device),
    }


FAMILIES = {
    "sd3": Family(
        SD3Transformer2DModel, ("JointTransformerBlock",), MEDIUM.transformer,
        TINY.transformer | {"num_layers": 6, "dual_attention_layers": (0, 1, 2)},
        {"num_layers": 4, "dual_attention_layers": (0, 1)}, (16, 8),
        lambda c: attention(f"transformer_blocks.{c['num_layers'] - 1}.attn.add_q_proj"),
        _sd3_inputs,
    ),
    "flux": Family(
        FluxTransformer2DModel, ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        FLUX_DEV.transformer,
        {"in_channels": 16, "num_layers": 3, "num_single_layers": 3, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
         "axes_dims_rope": (4, 6, 6)},
        {"num_layers": 2, "num_single_layers": 2}, (4, 2), lambda c: Flux.lora_targets,
        _flux_inputs,
    ),
    "wan": Family(
        WanTransformer3DModel, ("WanTransformerBlock",), WAN_1B.transformer,
        {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 16,
         "ffn_dim": 64, "num_layers": 3},
        {"num_layers": 2}, (2, 1), lambda c: Wan.lora_targets, _wan_inputs,
    ),
}  # fmt: skip


class Network:
    """One of them on a device in bfloat16, its LoRA as the trainer has it: float32, autocast.

    has_few: two blocks of each sort, to compile for all of them.
    """

    unread = ()  # modules whose results nothing reads: none

    def __init__(
        self, family: str, device: torch.device, has_few: bool = False, has_lora: bool = True
    ):
        self.family, self.device = FAMILIES[family], device
        config = self.family.config | (self.family.tiny if IS_REHEARSAL else {})
        self.config = config | (self.family.few if has_few else {})
        self.rows = (2, 1) if IS_REHEARSAL else self.family.rows
        torch.manual_seed(0)
        self.network = made(self.family.kind, self.config, device, torch.bfloat16)
        self.lora_targets = self.family.targets(self.config)
        self.inputs = self.family.inputs(self.config, max(self.rows), device)
        self.has_autocast = True
        if has_lora:
            self.add_lora()

    def add_lora(self) -> None:
        """Of random weights on both sides, so that it shows."""
        add_lora(self, LoraConfig(rank=32, alpha=64))
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.01)

    @property
    def learned(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    @property
    def blocks(self) -> list[nn.Module]:
        return [m for m in self.network.modules() if type(m).__name__ in self.family.blocks]

    def checkpoint(self, is_on: bool) -> None:
        """Gradient checkpointing of each block, by diffusers' own switch."""
        base = self.network.get_base_model()
        base.enable_gradient_checkpointing() if is_on else base.disable_gradient_checkpointing()

    def velocity(self, rows: int) -> Tensor:
        """Of the first rows of what it is asked: the same in every call."""
        dense_gradients()
        given = {k: v if k.endswith("_ids") else v[:rows] for k, v in self.inputs.items()}
        given["hidden_states"] = given["hidden_states"].to(torch.bfloat16)
        for name in ("encoder_hidden_states", "pooled_projections"):
            if name in given:
                given[name] = given[name].to(torch.bfloat16)
        amp = self.has_autocast and torch.autocast(self.device.type, torch.bfloat16)
        with amp or nullcontext():
            return self.network(**given, return_dict=False)[0]

    def learn(self, rows: int) -> Tensor:
        """Gradients of the LoRA's weights; the velocity that they are of."""
        for parameter in self.learned:
            parameter.grad = None
        out = self.velocity(rows)
        out.float().square().mean().backward()
        return out.detach()

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.float().flatten() for p in self.learned if p.grad is not None])


def operations(family: str) -> SimpleNamespace:
    """TFLOP of a row, forward and both ways: products and attention, counted without a device.

    Nothing that checkpointing computes again is among them.
    """
    model = Network(family, torch.device("meta"))
    model.has_autocast = False
    for parameter in model.learned:
        parameter.data = parameter.data.to(torch.bfloat16)
    found = [
        dry_run_of_blocks(model.network, model.blocks, partial(call, 1)).operations / 1e12
        for call in (torch.no_grad()(model.velocity), model.learn)
    ]
    return SimpleNamespace(forward=found[0], both=found[1])


def images(count: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The VAE of Stable Diffusion 3.5 in float32, and latents of images at 512 pixels."""
    architecture = TINY if IS_REHEARSAL else MEDIUM
    size = architecture.options["height"] // 8
    with torch.device(device):
        vae = vae_of(architecture).requires_grad_(False).eval()
        return vae, torch.randn(count, 16, size, size)
