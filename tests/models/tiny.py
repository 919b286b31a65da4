"""Pipelines of every family in a megabyte, with random weights, by diffusers' own classes.

No statistic of a VAE is 0 or 1, and no weight that a family begins at 0: what is left out shows.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Callable, Sequence
from functools import cache, partial

import tiny_text
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
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


def t5(
    tokenizer: type = T5Tokenizer,
    encoder: type = T5EncoderModel,
    config: type = T5Config,
    words: Sequence[str] = WORDS,
):
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in words), "▁"]
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


def vae(channels: int = 16, kind: type = AutoencoderKL, **more):
    """Of images, 8 pixels to a latent's."""
    if kind is AutoencoderKL:
        more = {"scaling_factor": 0.3611, "shift_factor": 0.1159} | more
    return kind(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2,
        latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False,
        **more,
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


def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_beta_sigmas=True)
    tokenizer, encoder = t5()
    return ChromaPipeline(scheduler, vae(), encoder, tokenizer, transformer)


def flux2(kind: type = Flux2Pipeline):
    """dev, or klein."""
    is_dev = kind is Flux2Pipeline
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=1, num_single_layers=1, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=48, timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=is_dev,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    made = vae(32, AutoencoderKLFlux2, batch_norm_eps=0.01)
    made.bn.running_mean.copy_(torch.linspace(-0.3, 0.4, 128))
    made.bn.running_var.copy_(torch.linspace(0.4, 1.5, 128))
    tokenizer, encoder = tiny_text.mistral() if is_dev else tiny_text.qwen3(28)
    return kind(scheduler, made, encoder, tokenizer, transformer)


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1536, 64, 64],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    tokenizer, encoder = tiny_text.qwen3(3, Qwen3Model)
    return ZImagePipeline(scheduler, vae(), encoder, tokenizer, transformer)


def video_vae(kind: type, channels: int, **more):
    """Of Wan's shape."""
    shape = dict(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                 temperal_downsample=[False, True, True])  # fmt: skip
    return kind(
        z_dim=channels, latents_mean=[0.1 * (c % 5) - 0.15 for c in range(channels)],
        latents_std=[0.5 + 0.1 * (c % 7) for c in range(channels)], **shape | more,
    )  # fmt: skip


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
        max_image_seq_len=8192, shift_terminal=0.02,
    )  # fmt: skip
    tokenizer, encoder = tiny_text.qwen_vl()
    made = video_vae(AutoencoderKLQwenImage, 16)
    return QwenImagePipeline(scheduler, made, encoder, tokenizer, transformer)


def wan(kind: str = "2.1") -> WanPipeline:
    """2.1, A14B with two networks, or TI2V-5B."""
    is_5b, is_14b = kind == "TI2V-5B", kind == "A14B"
    channels = 48 if is_5b else 16
    networks = [
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=channels,
            out_channels=channels, text_dim=32, freq_dim=16, ffn_dim=16, num_layers=2,
            rope_max_seq_len=64,
        )
        for _ in range(1 + is_14b)
    ]  # fmt: skip
    more = {}
    if is_5b:
        more = dict(decoder_base_dim=4, in_channels=12, out_channels=12, is_residual=True,
                      patch_size=2, scale_factor_spatial=16, scale_factor_temporal=4)  # fmt: skip
    made = video_vae(AutoencoderKLWan, channels, **more)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if is_5b else 3.0
    )
    tokenizer, encoder = t5(encoder=UMT5EncoderModel, config=UMT5Config)
    return WanPipeline(
        tokenizer, encoder, made, scheduler, *networks, boundary_ratio=0.875 if is_14b else None,
        expand_timesteps=is_5b,
    )  # fmt: skip


def ltx() -> LTXPipeline:
    """With a VAE that is told a noise level, as from 0.9.1 on."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, num_layers=2, caption_channels=32,
    )  # fmt: skip
    layers, scaled = (1, 1, 1, 1, 1), (True, True, True, False)
    made = AutoencoderKLLTXVideo(
        latent_channels=16, block_out_channels=[8] * 4, decoder_block_out_channels=[8] * 4,
        layers_per_block=layers, decoder_layers_per_block=layers, spatio_temporal_scaling=scaled,
        decoder_spatio_temporal_scaling=scaled, timestep_conditioning=True, scaling_factor=0.8,
    )  # fmt: skip
    made.latents_mean.copy_(torch.linspace(-0.3, 0.4, 16))
    made.latents_std.copy_(torch.linspace(0.5, 1.5, 16))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        max_image_seq_len=4096, shift_terminal=0.1,
    )  # fmt: skip
    tokenizer, encoder = t5()
    return LTXPipeline(scheduler, made, encoder, tokenizer, transformer)


def llama() -> tuple:
    """An encoder, and its tokenizer: for it HunyuanVideo's template has 108 tokens before the
    prompt, of which the pipeline cuts off the first 95.
    """
    template = DEFAULT_PROMPT_TEMPLATE["template"].replace("{}", " ").split()
    tokenizer, _ = t5(words=list(dict.fromkeys([*WORDS, *template[:-2]])))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return LlamaModel(config), tokenizer


def hunyuan_video() -> HunyuanVideoPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    made = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    tokenizer_2, encoder_2 = clip()
    return HunyuanVideoPipeline(
        *llama(), transformer, made, scheduler, encoder_2, tokenizer_2
    )  # fmt: skip


PIPELINES: dict[str, Callable] = {
    "sd3": sd3,
    "flux": flux,
    "qwen_image": qwen_image,
    "flux2": flux2,
    "klein": partial(flux2, Flux2KleinPipeline),
    "z_image": z_image,
    "chroma": chroma,
    "wan": wan,
    "wan_a14b": partial(wan, "A14B"),
    "wan_ti2v": partial(wan, "TI2V-5B"),
    "ltx": ltx,
    "hunyuan_video": hunyuan_video,
}


def pipeline(name: str):
    """The same weights each time, of the caller's own, and the same chance after them; tokenizers
    are everybody's."""
    made = _made(name)
    torch.manual_seed(0)
    parts = [part for name, part in made.components.items() if name.startswith("tokenizer")]
    return copy.deepcopy(made, {id(part): part for part in parts})


@cache
def _made(name: str):
    torch.manual_seed(0)
    made = PIPELINES[name]()
    made.set_progress_bar_config(disable=True)
    for network in (made.transformer, getattr(made, "transformer_2", None)):
        if network is not None:
            _nothing_is_zero(network)
    return made


@torch.no_grad()
def _nothing_is_zero(network: torch.nn.Module) -> None:
    """A layer that begins at zero makes a part of the network constant, and its gradient 0."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


def as_given(made, x: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline's own call takes them."""
    if isinstance(made, FluxPipeline | QwenImagePipeline | ChromaPipeline):
        return made._pack_latents(x, *x.shape)
    if isinstance(made, LTXPipeline):
        return made._pack_latents(x)
    return x


def called(
    made, prompts: list[str], options: dict, instead: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline's own call gives its VAE to decode, and what it returns where it is given
    `instead`: a VAE of random weights enlarges differences.
    """
    seen, decode = [], made.vae.decode

    def replaced(latents, *arguments, **more):
        seen.append(latents)
        return decode(instead, *arguments, **more)

    made.vae.decode = replaced
    try:
        images = made(prompt=prompts, output_type="pt", **options)[0]
    finally:
        del made.vae.decode
    return seen[0], images
