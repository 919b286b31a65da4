"""HunyuanVideo.

Guidance is an input of its network (`guidance_embedding`), as FLUX.1's is; a guidance_scale beyond
1 is two passes on top of it, the pipeline's true_cfg_scale. L text tokens of width E, padded under
a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from flowkern.models.attention_backend import Dispatching
from flowkern.models.embedded import EmbeddedPipeline
from flowkern.models.pipeline import ATTENTION
from flowkern.models.video import VideoPipeline

__all__ = ["HunyuanVideo"]


class HunyuanVideo(EmbeddedPipeline, VideoPipeline):
    """A HunyuanVideoPipeline; the parts of its conditioning are tokens (B, L, E), mask (B, L) and
    pooled (B, P)."""

    kind = HunyuanVideoPipeline
    frame_rate = 24
    dispatching: ClassVar[Mapping[type, type]] = {AttnProcessor2_0: Dispatching}  # of text alone
    lora_targets = ATTENTION

    def cells(self) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        return config.in_channels, self.pipeline.vae_scale_factor_spatial, config.patch_size

    def frame_step(self) -> int:
        return self.pipeline.vae_scale_factor_temporal

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        length = self.max_sequence_length
        tokens, pooled, mask = self.pipeline.encode_prompt(
            list(prompts), max_sequence_length=length
        )
        return {"tokens": tokens, "mask": mask, "pooled": pooled}

    def blank(self) -> dict[str, Tensor]:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return {
            "tokens": torch.empty(1, length, config.text_embed_dim, device="meta"),
            "mask": torch.empty(1, length, dtype=torch.int64, device="meta"),
            "pooled": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        scale = self.pipeline.scheduler.config.num_train_timesteps
        guidance = self.embedding(sigma)
        return network(
            hidden_states=x_t,
            timestep=sigma * scale,
            encoder_hidden_states=parts["tokens"],
            encoder_attention_mask=parts["mask"].to(x_t.dtype),
            pooled_projections=parts["pooled"],
            guidance=None if guidance is None else (guidance * 1000).to(x_t.dtype),
            return_dict=False,
        )[0]

    def grid_arguments(self, num_steps: int) -> dict[str, Any]:
        """From 1 to 0, the end left out."""
        levels = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return {"sigmas": levels[:-1].tolist()}

    def to_vae(self, latents: Tensor) -> Tensor:
        return latents / self.pipeline.vae.config.scaling_factor
