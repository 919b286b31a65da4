"""Qwen-Image.

Prompts have lengths of their own: all of a run are padded to one, under a mask. A guided velocity
is rescaled token by token to the length of the conditional one, as the pipeline does. L text tokens
of width E.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from flowkern.models import Guidance
from flowkern.models.packing import PATCH, PackedPipeline, packed, unpacked
from flowkern.models.pipeline import attention
from flowkern.ops.guidance import rescaled_guidance

__all__ = ["QwenImage"]


class QwenImage(PackedPipeline):
    """A QwenImagePipeline; the parts of its conditioning are tokens (B, L, E) and mask (B, L)."""

    kind = QwenImagePipeline
    guidance = Guidance("cfg_rescaled", " ")
    lengths = range(1, 1025)

    @property
    def lora_targets(self) -> str:
        """The last block's text queries are asked, and their answers dropped."""
        return attention(f"{self._last}.attn.add_q_proj", f"{self._last}.attn.to_add_out")

    @property
    def unread(self) -> list[str]:
        """What the last block makes of text."""
        return [f"{self._last}.attn.to_add_out", f"{self._last}.txt_mlp"]

    @property
    def _last(self) -> str:
        return f"transformer_blocks.{self.pipeline.transformer.config.num_layers - 1}"

    def own_length(self) -> int:
        return self.default("max_sequence_length")

    @property
    def template(self) -> str:
        return self.pipeline.prompt_template_encode

    def tokens_of(self, prompts: Sequence[str]) -> list[int]:
        """Without the system's words, which the pipeline cuts off."""
        texts = [self.pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        unseen = self.pipeline.prompt_template_encode_start_idx
        return [len(ids) - unseen for ids in self.pipeline.tokenizer(texts).input_ids]

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        length = self.max_sequence_length
        tokens, mask = self.pipeline.encode_prompt(list(prompts), max_sequence_length=length)
        if mask is None:  # all are as long as the longest
            mask = tokens.new_ones(tokens.shape[:2])
        missing = length - tokens.shape[1]
        return {
            "tokens": nn.functional.pad(tokens, (0, 0, 0, missing)),
            "mask": nn.functional.pad(mask.bool(), (0, missing)),
        }

    def blank(self) -> dict[str, Tensor]:
        width, length = (
            self.pipeline.transformer.config.joint_attention_dim,
            self.max_sequence_length,
        )
        mask = torch.ones(1, length, dtype=torch.bool, device="meta")
        return {"tokens": torch.empty(1, length, width, device="meta"), "mask": mask}

    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        height, width = x_t.shape[-2:]
        tokens = network(
            hidden_states=packed(x_t),
            timestep=sigma,
            encoder_hidden_states=parts["tokens"],
            encoder_hidden_states_mask=parts["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Of a video of one frame."""
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(each, dtype=latents.dtype, device=latents.device).view(-1, 1, 1)
            for each in (config.latents_mean, config.latents_std)
        )
        return (latents * std + mean).unsqueeze(2)

    def to_pixels(self, decoded: Tensor) -> Tensor:
        return super().to_pixels(decoded[:, :, 0])

    def guide(self, v_cond: Tensor, v_uncond: Tensor, w: float | Tensor) -> Tensor:
        """Every token of the guided velocity has the length of the conditional one's."""
        return rescaled_guidance(v_cond, v_uncond, w, PATCH)
