"""FLUX.1: dev, Krea-dev, schnell.

Guidance is an input of dev's network (`guidance_embedding`), learned from two passes; a
guidance_scale beyond 1 is two passes on top of it, the pipeline's true_cfg_scale. L text tokens of
width E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from flowkern.models.embedded import EmbeddedPipeline
from flowkern.models.packing import PackedPipeline, packed, positions, unpacked
from flowkern.models.pipeline import ATTENTION

__all__ = ["Flux"]


class Flux(EmbeddedPipeline, PackedPipeline):
    """A FluxPipeline; the parts of its conditioning are tokens (B, L, E) and pooled (B, P)."""

    kind = FluxPipeline
    lora_targets = ATTENTION

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        length = self.max_sequence_length
        tokens, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, max_sequence_length=length
        )
        return {"tokens": tokens, "pooled": pooled}

    def blank(self) -> dict[str, Tensor]:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return {
            "tokens": torch.empty(1, length, config.joint_attention_dim, device="meta"),
            "pooled": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        height, width = x_t.shape[-2:]
        tokens = network(
            hidden_states=packed(x_t),
            timestep=sigma,
            guidance=self.embedding(sigma),
            pooled_projections=parts["pooled"],
            encoder_hidden_states=parts["tokens"],
            txt_ids=sigma.new_zeros(parts["tokens"].shape[1], 3),
            img_ids=positions(height // 2, width // 2, x_t.device),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def grid_arguments(self, num_steps: int) -> dict[str, Any]:
        given = super().grid_arguments(num_steps)
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            del given["sigmas"]
        return given
