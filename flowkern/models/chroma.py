"""Chroma.

FLUX.1's latents, guided by two passes. Text is padded; its mask is of floating point, and diffusers
0.42 adds it to the logits of attention: padding is weakened and not left out, so that the number of
tokens is a part of the model. L text tokens of width E.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ChromaPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowkern.models.packing import PackedPipeline, packed, positions, unpacked
from flowkern.models.pipeline import ATTENTION

__all__ = ["Chroma"]


class Chroma(PackedPipeline):
    """A ChromaPipeline; the parts of its conditioning are tokens (B, L, E) and mask (B, L)."""

    kind = ChromaPipeline
    lora_targets = ATTENTION

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, _, mask, *_ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"tokens": tokens, "mask": mask}

    def blank(self) -> dict[str, Tensor]:
        width, length = (
            self.pipeline.transformer.config.joint_attention_dim,
            self.max_sequence_length,
        )
        tokens = torch.empty(1, length, width, device="meta")
        return {"tokens": tokens, "mask": torch.empty(1, length, device="meta")}

    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        height, width = x_t.shape[-2:]
        mask = nn.functional.pad(parts["mask"], (0, height * width // 4), value=1)
        # Where activations are recomputed, diffusers 0.42 leaves the mask out of single blocks.
        self.pipeline.transformer._gradient_checkpointing_func = partial(recomputed, mask=mask)
        tokens = network(
            hidden_states=packed(x_t),
            timestep=sigma,
            encoder_hidden_states=parts["tokens"],
            txt_ids=sigma.new_zeros(parts["tokens"].shape[1], 3),
            img_ids=positions(height // 2, width // 2, x_t.device),
            attention_mask=mask,
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)


def recomputed(block: nn.Module, *inputs: Any, mask: Tensor) -> Any:
    """A block of either kind, whose activations are not kept; its last input is the mask."""
    if inputs[-1] is not mask:
        inputs += (mask,)
    return checkpoint(block, *inputs, use_reentrant=False)
