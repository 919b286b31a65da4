"""Stable Diffusion 3.5 medium by its published configuration, with random weights, in memory.

The time of a network call is that of the real one; the text encoders are small, but as wide as the
real ones at their end, so that the network sees 77 + 256 tokens of its own widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from flowkern.models.sd3 import SD3

DEMO = Path(__file__).resolve().parents[1] / "assets/digits-sd3"


@dataclass(frozen=True)
class Architecture:
    transformer: dict[str, Any]
    vae_channels: tuple[int, ...]
    vae_layers: int
    norm_groups: int
    clip_widths: tuple[int, int]
    pixels: int
    tokens: tuple[int, int]
    """Of CLIP, of T5."""
    steps: int

    @property
    def text_width(self) -> int:
        return self.transformer["joint_attention_dim"]


MEDIUM = Architecture(
    transformer={
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
        "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    vae_channels=(128, 256, 512, 512), vae_layers=2, norm_groups=32,
    clip_widths=(768, 1280), pixels=512, tokens=(77, 256), steps=10,
)  # fmt: skip
TINY = Architecture(  # the same parts, for a rehearsal on a CPU
    transformer=MEDIUM.transformer | {
        "sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "joint_attention_dim": 128,
        "caption_projection_dim": 256, "pooled_projection_dim": 128, "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
    },
    vae_channels=(8, 8, 16, 16), vae_layers=1, norm_groups=4, clip_widths=(64, 64), pixels=64,
    tokens=(8, 8), steps=4,
)  # fmt: skip


def build(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> SD3:
    """The adapter over a pipeline made on the device: no file of weights is read."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with torch.device(device):
        try:
            torch.set_default_dtype(dtype)
            transformer = SD3Transformer2DModel(**architecture.transformer).to(dtype)
        finally:
            torch.set_default_dtype(default)
        vae = vae_of(architecture)
        encoders = [
            _clip(name, width).to(dtype)
            for name, width in zip(
                ("text_encoder", "text_encoder_2"), architecture.clip_widths, strict=True
            )
        ]
        encoders.append(_t5(architecture.text_width).to(dtype))
    nothing_is_zero(transformer)
    clip, t5 = architecture.tokens
    tokenizers = [_tokenizer(n, m) for n, m in (("", clip), ("_2", clip), ("_3", t5))]
    pipeline = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, encoders[0], tokenizers[0],
        encoders[1], tokenizers[1], encoders[2], tokenizers[2],
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pixels = architecture.pixels
    return SD3(pipeline, height=pixels, width=pixels)


def vae_of(architecture: Architecture) -> AutoencoderKL:
    """In float32, as the adapter keeps it."""
    blocks = len(architecture.vae_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=architecture.vae_channels,
        layers_per_block=architecture.vae_layers,
        norm_num_groups=architecture.norm_groups,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(name: str, width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig.from_pretrained(DEMO / name)
    config.hidden_size = config.projection_dim = width
    config.intermediate_size, config.num_attention_heads = width, width // 64 or 1
    config.max_position_embeddings = MEDIUM.tokens[0]
    return CLIPTextModelWithProjection(config)


def _t5(width: int) -> T5EncoderModel:
    config = T5Config.from_pretrained(DEMO / "text_encoder_3")
    config.d_model = width
    return T5EncoderModel(config)


def _tokenizer(suffix: str, length: int):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / f"tokenizer{suffix}")
    tokenizer.model_max_length = length  # the demo's end at 8
    return tokenizer


@torch.no_grad()
def nothing_is_zero(network: torch.nn.Module) -> None:
    """What begins at zero would make a part of the network constant."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
