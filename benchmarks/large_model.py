"""Stable Diffusion 3.5 medium by its published configuration, with random weights, in memory.

The time of a network call is that of the real one; the text encoders are small, but as wide as the
real ones at their end, so that the network sees 77 + 256 tokens of its own widths. Other families:
larger_models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from flowkern.models.pipeline import Pipeline
from flowkern.models.published import SD35_MEDIUM
from flowkern.models.sd3 import SD3

DEMO = Path(__file__).resolve().parents[1] / "assets/digits-sd3"


@dataclass(frozen=True)
class Architecture:
    """Of Stable Diffusion 3.5, and what other families have of it."""

    transformer: Mapping[str, Any]
    vae_channels: tuple[int, ...]
    vae_layers: int
    norm_groups: int
    clip_widths: tuple[int, ...]
    options: Mapping[str, int]
    """Of the adapter: sizes."""
    tokens: tuple[int, int]
    """Of CLIP, of T5."""

    kind: ClassVar[type[Pipeline]] = SD3
    network: ClassVar[type[nn.Module]] = SD3Transformer2DModel
    vae_factors: ClassVar[tuple[float, float]] = (1.5305, 0.0609)
    few: ClassVar[tuple[dict[str, Any], ...]] = (
        {"num_layers": 4, "dual_attention_layers": (0, 1)},
        {"num_layers": 3, "dual_attention_layers": ()},
    )
    """What a network otherwise has that has two blocks of every sort, and two of the last sort
    where there are several. Two, as into the first nothing comes with a gradient, which makes
    another graph."""

    def smaller(self, sorts: int) -> Architecture:
        """With a few blocks: of every sort, or (1) of the last one."""
        few = self.few[0 if sorts > 1 else -1]
        return replace(self, transformer={**self.transformer, **few})

    @property
    def text(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a prompt's parts."""
        width, pooled = (
            self.transformer[f"{name}_dim"] for name in ("joint_attention", "pooled_projection")
        )
        return {"tokens": (sum(self.tokens), width), "pooled": (pooled,)}

    def scheduler(self) -> Any:
        return FlowMatchEulerDiscreteScheduler(shift=3.0)

    def pipeline(self, network: nn.Module, scheduler: Any, dtype: torch.dtype) -> Any:
        """Around a network, on the device that new tensors are made on."""
        clip, t5 = self.tokens
        encoders = [
            clip_of(name, width, CLIPTextModelWithProjection).to(dtype)
            for name, width in zip(("", "_2"), self.clip_widths, strict=True)
        ]
        encoders.append(t5_of(self.transformer["joint_attention_dim"]).to(dtype))
        tokenizers = [tokenizer(n, m) for n, m in (("", clip), ("_2", clip), ("_3", t5))]
        return StableDiffusion3Pipeline(
            network, scheduler, vae_of(self), encoders[0], tokenizers[0], encoders[1],
            tokenizers[1], encoders[2], tokenizers[2],
        )  # fmt: skip

    def build(self, device: torch.device, dtype: torch.dtype) -> Pipeline:
        """The adapter over a pipeline made on the device: no file of weights is read."""
        torch.manual_seed(0)
        network, scheduler = made(self.network, self.transformer, device, dtype), self.scheduler()
        with torch.device(device):
            pipeline = self.pipeline(network, scheduler, dtype)
        pipeline.set_progress_bar_config(disable=True)
        return self.kind(pipeline, **self.options)


MEDIUM = Architecture(
    transformer=SD35_MEDIUM,
    vae_channels=(128, 256, 512, 512), vae_layers=2, norm_groups=32,
    clip_widths=(768, 1280), options={"height": 512, "width": 512}, tokens=(77, 256),
)  # fmt: skip
TINY = Architecture(  # the same parts, for a rehearsal on a CPU
    transformer=MEDIUM.transformer | {
        "sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "joint_attention_dim": 128,
        "caption_projection_dim": 256, "pooled_projection_dim": 128, "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
    },
    vae_channels=(8, 8, 16, 16), vae_layers=1, norm_groups=4, clip_widths=(64, 64),
    options={"height": 64, "width": 64}, tokens=(8, 8),
)  # fmt: skip


def made(
    kind: type[nn.Module], config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A network on the device, without gradients; what diffusers keeps in float32 is."""
    default = torch.get_default_dtype()
    with torch.device(device):
        try:
            torch.set_default_dtype(dtype)
            network = nn.Module.to(kind(**config), dtype)  # buffers, too
        finally:
            torch.set_default_dtype(default)
    if device.type != "meta":
        nothing_is_zero(network)
    kept = kind._keep_in_fp32_modules or []
    for name, parameter in network.named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()
    return network.requires_grad_(False).eval()


def vae_of(architecture: Architecture) -> AutoencoderKL:
    """In float32, as the adapter keeps it."""
    blocks = len(architecture.vae_channels)
    scaling, shift = architecture.vae_factors
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=architecture.vae_channels,
        layers_per_block=architecture.vae_layers,
        norm_num_groups=architecture.norm_groups,
        latent_channels=16,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_of(suffix: str, width: int, kind: type[nn.Module]) -> nn.Module:
    config = CLIPTextConfig.from_pretrained(DEMO / f"text_encoder{suffix}")
    config.hidden_size = config.projection_dim = width
    config.intermediate_size, config.num_attention_heads = width, width // 64 or 1
    config.max_position_embeddings = MEDIUM.tokens[0]
    return kind(config)


def t5_of(width: int, config: type = T5Config, kind: type[nn.Module] = T5EncoderModel) -> nn.Module:
    found = T5Config.from_pretrained(DEMO / "text_encoder_3").to_dict()
    return kind(config(**found | {"d_model": width, "model_type": config.model_type}))


def tokenizer(suffix: str, length: int):
    found = AutoTokenizer.from_pretrained(DEMO / f"tokenizer{suffix}", trust_remote_code=False)
    found.model_max_length = length  # the demo's end at 8
    return found


@torch.no_grad()
def nothing_is_zero(network: nn.Module) -> None:
    """What begins at zero would make a part of the network constant."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
