"""Stable Diffusion 3 and 3.5.

Everything is read from the pipeline directory: text encoders (with or without T5), latent channels,
resolution, the VAE's scaling. L text tokens of width E: CLIP's and T5's together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from flowkern.models.attention_backend import Dispatching
from flowkern.models.geometry import Geometry
from flowkern.models.grids import dynamic_mu
from flowkern.models.pipeline import Pipeline, attention
from flowkern.schedules import sd3_sigmas

__all__ = ["SD3"]


class SD3(Pipeline):
    """A StableDiffusion3Pipeline; the parts of its conditioning are tokens (B, L, E) and pooled
    (B, P).
    """

    kind = StableDiffusion3Pipeline
    blocks = ("JointTransformerBlock",)
    dispatching: ClassVar[Mapping[type, type]] = {JointAttnProcessor2_0: Dispatching}
    optional = ("text_encoder_3", "tokenizer_3")

    @property
    def lora_targets(self) -> str:
        """The last block's text queries are asked, and their answers dropped."""
        last = self.pipeline.transformer.config.num_layers - 1
        return attention(f"transformer_blocks.{last}.attn.add_q_proj")

    @property
    def lengths(self) -> range:
        """None where there is no T5, whose tokenizer takes no 0: zeros stand for its tokens."""
        return range(0 if self.pipeline.tokenizer_3 is None else 1, 513)

    def own_length(self) -> int:
        """T5's tokenizer's own maximum, at most 256: 256 for SD3.5, as diffusers has it."""
        has_t5 = self.pipeline.tokenizer_3 is not None
        return min(256, self.pipeline.tokenizer_3.model_max_length) if has_t5 else 256

    def geometry(self) -> Geometry:
        config, scale = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        own, unit = config.sample_size * scale, config.patch_size * scale
        most = config.pos_embed_max_size and config.pos_embed_max_size * unit
        return Geometry(config.in_channels, scale, unit, own, own, most)

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"tokens": tokens, "pooled": pooled}

    def blank(self) -> dict[str, Tensor]:
        config = self.pipeline.transformer.config
        length = self.pipeline.tokenizer.model_max_length + self.max_sequence_length
        return {
            "tokens": torch.empty(1, length, config.joint_attention_dim, device="meta"),
            "pooled": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        return network(
            hidden_states=x_t,
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=parts["tokens"],
            pooled_projections=parts["pooled"],
            return_dict=False,
        )[0]

    def grid_arguments(self, num_steps: int) -> dict[str, Any]:
        """mu, by the number of patches, where the scheduler shifts by it."""
        scheduler, config = self.pipeline.scheduler, self.pipeline.transformer.config
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, height, width = self.latent_shape
        return {"mu": dynamic_mu(scheduler, height * width // config.patch_size**2)}

    def closed_form(self, num_steps: int) -> Tensor | None:
        return sd3_sigmas(num_steps, float(self.pipeline.scheduler.config.get("shift", 3.0)))
