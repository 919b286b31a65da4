"""Z-Image, base and Turbo.

Its network is asked at 1 - sigma and answers clean - noise. It takes and gives lists, and pads each
prompt to a multiple of 32 tokens with one that it learned. The pipeline's own guidance_scale is
w - 1. L text tokens of width E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flowkern.models.geometry import Geometry
from flowkern.models.grids import dynamic_mu, even
from flowkern.models.pipeline import Pipeline

__all__ = ["ZImage"]


class ZImage(Pipeline):
    """A ZImagePipeline; the parts of its conditioning are tokens (B, L, E) and their number in each
    row, length (B,), which stays on the host."""

    kind = ZImagePipeline
    stays = ("length",)
    lora_targets = "to_q to_k to_v to_out.0".split()

    def own_length(self) -> int:
        return self.default("max_sequence_length")

    def conversation(self, prompt: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": prompt}]

    def tokens_of(self, prompts: Sequence[str]) -> list[int]:
        tokenizer = self.pipeline.tokenizer
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        texts = [
            tokenizer.apply_chat_template(self.conversation(prompt), **options)
            for prompt in prompts
        ]
        return list(map(len, tokenizer(texts).input_ids))

    def geometry(self) -> Geometry:
        scale = self.pipeline.vae_scale_factor
        return Geometry(self.pipeline.transformer.config.in_channels, scale, 2 * scale, 1024, 1024)

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Of a copy of the prompts: the pipeline writes its template into the list."""
        length = self.max_sequence_length
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=length
        )
        tokens = pad_sequence(rows, batch_first=True)
        return {
            "tokens": nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[1])),
            "length": torch.tensor([len(row) for row in rows]),
        }

    def blank(self) -> dict[str, Tensor]:
        width, length = self.pipeline.transformer.config.cap_feat_dim, self.max_sequence_length
        tokens = torch.empty(1, length, width, device="meta")
        return {"tokens": tokens, "length": torch.tensor([length])}

    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        lengths = parts["length"].tolist()
        tokens = [row[:length] for row, length in zip(parts["tokens"], lengths, strict=True)]
        images = list(x_t.unsqueeze(2))
        return -torch.stack(network(images, 1 - sigma, tokens, return_dict=False)[0]).squeeze(2)

    def grid_arguments(self, num_steps: int) -> dict[str, Any]:
        _, height, width = self.latent_shape
        mu = dynamic_mu(self.pipeline.scheduler, height * width // 4)
        return {"mu": mu, "sigmas": even(num_steps)}
