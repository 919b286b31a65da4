"""Pipelines of every family in a megabyte, with random weights, by diffusers' own classes.

No statistic of a VAE is 0 or 1, and no weight that a family begins at 0: what is left out shows.
"""

from __future__ import annotations

import string
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = "a an the of and photo cat dog red blue seven old small on in".split()


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip(kind: type = CLIPTextModel) -> tuple:
    """Tokenizer and encoder."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, kind(config)


def t5(tokenizer: type = T5Tokenizer, encoder: type = T5EncoderModel, config: type = T5Config):
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), "▁"]
    pieces += string.ascii_letters + string.digits + string.punctuation
    vocabulary = [
        (piece, 0.0 if index < 3 else -float(index)) for index, piece in enumerate(pieces)
    ]
    made = tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    shape = config(
        vocab_size=len(made), d_model=32, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return made, encoder(shape)


def vae(channels: int = 16, **more) -> AutoencoderKL:
    """Of images, 8 pixels to a latent's."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2,
        latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False,
        **{"scaling_factor": 0.3611, "shift_factor": 0.1159} | more,
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=96, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    parts = [*clip(CLIPTextModelWithProjection), *clip(CLIPTextModelWithProjection), *t5()]
    named = dict(zip(("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3",
                      "text_encoder_3"), parts, strict=True))  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    of_vae = vae(scaling_factor=1.5305, shift_factor=0.0609)
    return StableDiffusion3Pipeline(transformer, scheduler, of_vae, **named)


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=32, pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(), t5()
    return FluxPipeline(scheduler, vae(), encoder, tokenizer, encoder_2, tokenizer_2, transformer)


PIPELINES: dict[str, Callable] = {"sd3": sd3, "flux": flux}


def pipeline(name: str):
    """The same weights each time."""
    torch.manual_seed(0)
    made = PIPELINES[name]()
    made.set_progress_bar_config(disable=True)
    _nothing_is_zero(made.transformer)
    return made


@torch.no_grad()
def _nothing_is_zero(network: torch.nn.Module) -> None:
    """A layer that begins at zero makes a part of the network constant, and its gradient 0."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


def as_given(made, x: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline's own call takes them."""
    if isinstance(made, FluxPipeline):
        return made._pack_latents(x, *x.shape)
    return x


def before_decoding(made, prompts: list[str], options: dict) -> torch.Tensor:
    """What the pipeline's own call gives its VAE to decode."""
    seen, decode = [], made.vae.decode

    def recorded(latents, *arguments, **more):
        seen.append(latents)
        return decode(latents, *arguments, **more)

    made.vae.decode = recorded
    try:
        made(prompt=prompts, output_type="pt", **options)
    finally:
        del made.vae.decode
    return torch.cat(seen)
