"""FLUX.2: dev, and klein.

A latent has a token for each of its pixels. dev's network is told a guidance scale
(`guidance_embedding`); klein is guided by two passes, unless it was distilled from them. L text
tokens of width E, padded without a mask: their number is a part of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from torch import Tensor, nn

from flowkern.models import Guidance
from flowkern.models.embedded import EmbeddedPipeline
from flowkern.models.geometry import Geometry
from flowkern.models.grids import even
from flowkern.models.packing import positions

__all__ = ["Flux2", "Flux2Klein"]


class Flux2(EmbeddedPipeline):
    """A Flux2Pipeline; the part of its conditioning is tokens (B, L, E)."""

    kind = Flux2Pipeline
    lora_targets = (
        r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
        r"|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out"
    )

    def geometry(self) -> Geometry:
        """The VAE's patches of two by two are channels of a latent."""
        cell = 2 * self.pipeline.vae_scale_factor
        own = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return Geometry(self.pipeline.transformer.config.in_channels, cell, cell, own, own)

    def conversation(self, prompt: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": prompt}]}]

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        length = self.max_sequence_length
        tokens, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=length)
        return {"tokens": tokens}

    def blank(self) -> dict[str, Tensor]:
        width = self.pipeline.transformer.config.joint_attention_dim
        return {"tokens": torch.empty(1, self.max_sequence_length, width, device="meta")}

    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        size, length = x_t.shape[-2:], parts["tokens"].shape[1]
        order = torch.arange(length, dtype=torch.float32, device=x_t.device)
        tokens = network(
            hidden_states=x_t.flatten(2).mT,
            timestep=sigma,
            guidance=self.embedding(sigma),
            encoder_hidden_states=parts["tokens"],
            txt_ids=nn.functional.pad(order[:, None], (3, 0)),
            img_ids=nn.functional.pad(positions(*size, x_t.device), (0, 1)),
            return_dict=False,
        )[0]
        return tokens.mT.unflatten(-1, size)

    def grid_arguments(self, num_steps: int) -> dict[str, Any]:
        _, height, width = self.latent_shape
        own = {"mu": empirical_mu(height * width, num_steps)}
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return own
        return own | {"sigmas": even(num_steps)}

    def to_vae(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (
            each.to(latents.dtype).view(-1, 1, 1)
            for each in (vae.bn.running_mean, vae.bn.running_var)
        )
        latents = latents * (variance + vae.config.batch_norm_eps).sqrt() + mean
        return nn.functional.pixel_shuffle(latents, 2)


class Flux2Klein(Flux2):
    """A Flux2KleinPipeline; the part of its conditioning is tokens (B, L, E)."""

    kind = Flux2KleinPipeline

    def __init__(self, pipeline: Flux2KleinPipeline, **options: Any) -> None:
        self.guidance = Guidance("none" if pipeline.config.is_distilled else "cfg")
        super().__init__(pipeline, **options)

    def conversation(self, prompt: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": prompt}]


def empirical_mu(tokens: int, num_steps: int) -> float:
    """The shift of a scheduler, measured by FLUX.2's authors at 10 and at 200 steps and drawn on as
    a line through them; of large images at 200 (diffusers' compute_empirical_mu)."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)
