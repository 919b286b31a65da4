"""FLUX.1-dev and Wan 2.1 1.3B by their published configurations, as large_model.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from large_model import Architecture, clip_of, t5_of, tokenizer, vae_of
from torch import nn
from transformers import CLIPTextModel, UMT5Config, UMT5EncoderModel

from flowkern.models.flux import Flux
from flowkern.models.published import FLUX1_DEV, WAN21_1B
from flowkern.models.wan import Wan


@dataclass(frozen=True)
class FluxArchitecture(Architecture):
    kind: ClassVar[type] = Flux
    network: ClassVar[type[nn.Module]] = FluxTransformer2DModel
    vae_factors: ClassVar[tuple[float, float]] = (0.3611, 0.1159)
    few: ClassVar[tuple[dict[str, Any], ...]] = (
        {"num_layers": 2, "num_single_layers": 2},
        {"num_layers": 1, "num_single_layers": 2},
    )

    @property
    def text(self) -> dict[str, tuple[int, ...]]:
        return super().text | {"tokens": (self.tokens[1], self.transformer["joint_attention_dim"])}

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=4096,
        )  # fmt: skip

    def pipeline(self, network: nn.Module, scheduler: Any, dtype: torch.dtype) -> FluxPipeline:
        clip, t5 = self.tokens
        encoders = (
            clip_of("", self.clip_widths[0], CLIPTextModel).to(dtype),
            t5_of(self.transformer["joint_attention_dim"]).to(dtype),
        )
        return FluxPipeline(
            scheduler, vae_of(self), encoders[0], tokenizer("", clip), encoders[1],
            tokenizer("_3", t5), network,
        )  # fmt: skip


@dataclass(frozen=True)
class WanArchitecture(Architecture):
    kind: ClassVar[type] = Wan
    network: ClassVar[type[nn.Module]] = WanTransformer3DModel
    few: ClassVar[tuple[dict[str, Any], ...]] = ({"num_layers": 2},)

    @property
    def text(self) -> dict[str, tuple[int, ...]]:
        return {"tokens": (self.tokens[1], self.transformer["text_dim"])}

    def scheduler(self) -> UniPCMultistepScheduler:
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )

    def pipeline(self, network: nn.Module, scheduler: Any, dtype: torch.dtype) -> WanPipeline:
        base, length = self.vae_channels[0], self.tokens[1]
        vae = AutoencoderKLWan(
            base_dim=base, dim_mult=[width // base for width in self.vae_channels],
            num_res_blocks=self.vae_layers,
        )  # fmt: skip
        encoder = t5_of(self.transformer["text_dim"], UMT5Config, UMT5EncoderModel).to(dtype)
        return WanPipeline(tokenizer("_3", length), encoder, vae, scheduler, network)


FLUX_DEV = FluxArchitecture(
    transformer=FLUX1_DEV,
    vae_channels=(128, 256, 512, 512), vae_layers=2, norm_groups=32,
    clip_widths=(768,), options={"height": 512, "width": 512, "max_sequence_length": 512},
    tokens=(77, 512),
)  # fmt: skip
TINY_FLUX = FluxArchitecture(
    transformer=FLUX_DEV.transformer | {
        "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
    vae_channels=(8, 8, 16, 16), vae_layers=1, norm_groups=4,
    clip_widths=(64,), options={"height": 64, "width": 64, "max_sequence_length": 8}, tokens=(8, 8),
)  # fmt: skip
WAN_1B = WanArchitecture(
    transformer=WAN21_1B,
    vae_channels=(96, 192, 384, 384), vae_layers=2, norm_groups=0, clip_widths=(),
    options={"height": 480, "width": 832, "num_frames": 33, "max_sequence_length": 512},
    tokens=(0, 512),
)  # fmt: skip
TINY_WAN = WanArchitecture(
    transformer=WAN_1B.transformer | {
        "num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 32,
        "ffn_dim": 256, "num_layers": 2,
    },
    vae_channels=(4, 4, 8, 8), vae_layers=1, norm_groups=0, clip_widths=(),
    options={"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}, tokens=(0, 8),
)  # fmt: skip
