"""Published configurations, by ids of the hub: what sizes a model has, without its files.

The numbers of the config.json files there; what is not named is the class's own default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["FLUX1_DEV", "PUBLISHED", "SD35_MEDIUM", "WAN21_1B", "Part", "Published"]


@dataclass(frozen=True)
class Part:
    """A module of diffusers or transformers."""

    kind: str
    """Its class."""
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    pipeline: str
    """Its class."""
    parts: Mapping[str, Part]
    """By their names in the index: transformer, vae, scheduler, text encoders."""
    lengths: Mapping[str, int]
    """Tokens that a tokenizer holds, by its name."""
    options: Mapping[str, Any]
    """Of the index, beside its parts."""


SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
    "pos_embed_max_size": 192, "dual_attention_layers": (),
}  # fmt: skip
FLUX1_DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
WAN21_1B = {
    "patch_size": (1, 2, 2), "num_attention_heads": 12, "attention_head_dim": 128,
    "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960,
    "num_layers": 30, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
WAN21_14B = WAN21_1B | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN22_5B = WAN21_1B | {
    "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336,
}  # fmt: skip
KLEIN_4B = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
KLEIN_9B = {
    "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
    "joint_attention_dim": 12288, "guidance_embeds": False,
}  # fmt: skip


def _clip(kind: str, width: int, layers: int, heads: int) -> Part:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    return Part(kind, {"vocab_size": 49408, "max_position_embeddings": 77} | sizes)


def _t5(kind: str, words: int) -> Part:
    sizes = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
    return Part(kind, {"vocab_size": words, "feed_forward_proj": "gated-gelu"} | sizes)


def _qwen3(width: int, inner: int, is_tied: bool, kind: str = "Qwen3ForCausalLM") -> Part:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 36}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    return Part(kind, {"vocab_size": 151936, "tie_word_embeddings": is_tied} | sizes)


CLIP_L = _clip("CLIPTextModelWithProjection", 768, 12, 12)
CLIP_G = _clip("CLIPTextModelWithProjection", 1280, 32, 20)
T5, UMT5 = _t5("T5EncoderModel", 32128), _t5("UMT5EncoderModel", 256384)
QWEN25_VL = Part(
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
                          "num_heads": 16, "out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
)  # fmt: skip

LLAMA = Part(
    "LlamaModel",
    {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128320,
    },
)  # fmt: skip
"""Llama 3 of 8 B without its last layer, as LLaVA has it: with 64 tokens more."""
MISTRAL = Part(
    "Mistral3ForConditionalGeneration",
    {
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768,
            "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 131072,
        },
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
        },
        "tie_word_embeddings": False,
    },
)  # fmt: skip
"""Mistral Small 3.1 of 24 B."""


def _vae(scaling: float, shift: float) -> Part:
    return Part("AutoencoderKL", {
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
        "latent_channels": 16, "scaling_factor": scaling, "shift_factor": shift,
        "use_quant_conv": False, "use_post_quant_conv": False,
    })  # fmt: skip


WAN22_VAE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12,
    "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
EULER = "FlowMatchEulerDiscreteScheduler"
SHIFTED = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SHIFTED |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}


def _sd3(config: Mapping[str, Any]) -> Published:
    parts = {
        "transformer": Part("SD3Transformer2DModel", config), "vae": _vae(1.5305, 0.0609),
        "scheduler": Part(EULER, {"shift": 3.0}),
        "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5,
    }  # fmt: skip
    lengths = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512}
    return Published("StableDiffusion3Pipeline", parts, lengths, {})


def _klein(config: Mapping[str, Any], encoder: Part) -> Published:
    parts = {
        "transformer": Part("Flux2Transformer2DModel", config), "text_encoder": encoder,
        "vae": Part("AutoencoderKLFlux2", {}), "scheduler": Part(EULER, SHIFTED),
    }  # fmt: skip
    return Published("Flux2KleinPipeline", parts, {"tokenizer": 512}, {"is_distilled": False})


def _wan(config: Mapping[str, Any], vae: Mapping[str, Any], shift: float) -> Published:
    grid = {"flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    parts = {
        "transformer": Part("WanTransformer3DModel", config), "vae": Part("AutoencoderKLWan", vae),
        "scheduler": Part("UniPCMultistepScheduler", grid), "text_encoder": UMT5,
    }  # fmt: skip
    return Published("WanPipeline", parts, {"tokenizer": 512}, {})


_WAN21_14B = _wan(WAN21_14B, {}, 3.0)
_A14B = {"transformer_2": Part("WanTransformer3DModel", WAN21_14B)}
_FLUX1 = Published(
    "FluxPipeline",
    {
        "transformer": Part("FluxTransformer2DModel", FLUX1_DEV), "vae": _vae(0.3611, 0.1159),
        "scheduler": Part(EULER, SHIFTED | {"shift": 3.0}),
        "text_encoder": replace(CLIP_L, kind="CLIPTextModel"), "text_encoder_2": T5,
    },
    {"tokenizer": 77, "tokenizer_2": 512}, {},
)  # fmt: skip
_QWEN = Published(
    "QwenImagePipeline",
    {
        "transformer": Part("QwenImageTransformer2DModel", {}),
        "vae": Part("AutoencoderKLQwenImage", {}), "text_encoder": QWEN25_VL,
        "scheduler": Part(EULER, SHIFTED | {"max_shift": 0.9, "max_image_seq_len": 8192,
                                            "shift_terminal": 0.02}),
    },
    {"tokenizer": 1024}, {},
)  # fmt: skip
_LTX = Published(
    "LTXPipeline",
    {
        "transformer": Part("LTXVideoTransformer3DModel", {}),
        "vae": Part("AutoencoderKLLTXVideo", {}), "text_encoder": T5,
        "scheduler": Part(EULER, SHIFTED | {
            "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
            "shift_terminal": 0.1,
        }),
    },
    {"tokenizer": 128}, {},
)  # fmt: skip
"""As Lightricks/LTX-Video's own diffusers_config_mapping.py has it."""
_HUNYUAN_VIDEO = Published(
    "HunyuanVideoPipeline",
    {
        "transformer": Part("HunyuanVideoTransformer3DModel", {}),
        "vae": Part("AutoencoderKLHunyuanVideo", {}), "scheduler": Part(EULER, {"shift": 7.0}),
        "text_encoder": LLAMA, "text_encoder_2": replace(CLIP_L, kind="CLIPTextModel"),
    },
    {"tokenizer": 256, "tokenizer_2": 77}, {},
)  # fmt: skip
_CHROMA = Published(
    "ChromaPipeline",
    {
        "transformer": Part("ChromaTransformer2DModel", {}), "vae": _vae(0.3611, 0.1159),
        "text_encoder": T5, "scheduler": Part(EULER, {}),
    },
    {"tokenizer": 512}, {},
)  # fmt: skip
"""By the class's defaults: its file has their 17.8 GB. Its grid of levels was not seen."""
_FLUX2_DEV = Published(
    "Flux2Pipeline",
    {
        "transformer": Part("Flux2Transformer2DModel", {}), "text_encoder": MISTRAL,
        "vae": Part("AutoencoderKLFlux2", {}), "scheduler": Part(EULER, SHIFTED),
    },
    {"tokenizer": 512}, {},
)  # fmt: skip
_Z_IMAGE = Published(
    "ZImagePipeline",
    {
        "transformer": Part("ZImageTransformer2DModel", {}), "vae": _vae(0.3611, 0.1159),
        "text_encoder": _qwen3(2560, 9728, True, "Qwen3Model"),
        "scheduler": Part(EULER, {"shift": 6.0}),
    },
    {"tokenizer": 512}, {},
)  # fmt: skip

PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-medium": _sd3(SD35_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": _sd3(SD35_LARGE),
    "black-forest-labs/FLUX.1-dev": _FLUX1,
    "black-forest-labs/FLUX.1-Krea-dev": _FLUX1,
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(KLEIN_4B, _qwen3(2560, 9728, True)),
    "black-forest-labs/FLUX.2-klein-base-9B": _klein(KLEIN_9B, _qwen3(4096, 12288, False)),
    "black-forest-labs/FLUX.2-dev": _FLUX2_DEV,
    "Lightricks/LTX-Video": _LTX,
    "lodestones/Chroma1-HD": _CHROMA,
    "hunyuanvideo-community/HunyuanVideo": _HUNYUAN_VIDEO,
    "Qwen/Qwen-Image": _QWEN,
    "Tongyi-MAI/Z-Image": _Z_IMAGE,
    "Tongyi-MAI/Z-Image-Turbo": _Z_IMAGE,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(WAN21_1B, {}, 3.0),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _WAN21_14B,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": replace(
        _wan(WAN22_5B, WAN22_VAE, 5.0), options={"expand_timesteps": True}
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": replace(
        _WAN21_14B, parts=_WAN21_14B.parts | _A14B, options={"boundary_ratio": 0.875}
    ),
}
