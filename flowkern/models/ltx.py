"""LTX-Video.

Its network takes tokens, one per cell of a latent, and the video's frames per second, by which it
knows when a frame is. L text tokens of width E, padded under a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import LTXPipeline
from torch import Tensor, nn

from flowkern.models.grids import dynamic_mu, even
from flowkern.models.video import VideoPipeline

__all__ = ["LTX"]


class LTX(VideoPipeline):
    """An LTXPipeline; the parts of its conditioning are tokens (B, L, E) and mask (B, L)."""

    kind = LTXPipeline
    lora_targets = "to_q to_k to_v to_out.0".split()

    def __init__(
        self, pipeline: LTXPipeline, *, frame_rate: float | None = None, **options: Any
    ) -> None:
        """frame_rate: frames per second of the videos; None: the pipeline's own.

        Raises ValueError for a rate that is none.
        """
        self.frame_rate = self.default("frame_rate") if frame_rate is None else frame_rate
        if not 0 < self.frame_rate < float("inf"):
            raise ValueError(f"frame_rate: got {frame_rate}, expected frames per second above 0")
        super().__init__(pipeline, **options)

    def cells(self) -> tuple[int, int, int]:
        return (
            self.pipeline.transformer.config.in_channels,
            self.pipeline.vae_spatial_compression_ratio,
            1,
        )

    def frame_step(self) -> int:
        return self.pipeline.vae_temporal_compression_ratio

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, mask, *_ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"tokens": tokens, "mask": mask}

    def blank(self) -> dict[str, Tensor]:
        width, length = self.pipeline.transformer.config.caption_channels, self.max_sequence_length
        mask = torch.empty(1, length, dtype=torch.bool, device="meta")
        return {"tokens": torch.empty(1, length, width, device="meta"), "mask": mask}

    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        size = x_t.shape[2:]
        step, cell = self.frame_step(), self.cells()[1]
        tokens = network(
            hidden_states=x_t.flatten(2).mT,
            encoder_hidden_states=parts["tokens"],
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_attention_mask=parts["mask"],
            **dict(zip(("num_frames", "height", "width"), size, strict=True)),
            rope_interpolation_scale=(step / self.frame_rate, cell, cell),
            return_dict=False,
        )[0]
        return tokens.mT.unflatten(2, size)

    def grid_arguments(self, num_steps: int) -> dict[str, Any]:
        _, frames, height, width = self.latent_shape
        mu = dynamic_mu(self.pipeline.scheduler, frames * height * width)
        return {"mu": mu, "sigmas": even(num_steps)}

    def to_vae(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        statistics = torch.stack([vae.latents_mean, vae.latents_std]).to(latents)
        mean, std = statistics.view(2, -1, 1, 1, 1)
        return latents * std / vae.config.scaling_factor + mean

    def vae_arguments(self, latents: Tensor) -> dict[str, Any]:
        """From 0.9.1 on it is told how much noise the latents have: none."""
        if not self.pipeline.vae.config.timestep_conditioning:
            return {}
        return {"temb": latents.new_zeros(len(latents))}
