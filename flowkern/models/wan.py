"""Wan: 2.1 text to video, 2.2 A14B with its two networks, 2.2 TI2V-5B without an image.

A14B has a network for the noise levels from its boundary up and one for those below it: together
they are one network here, which asks the right one for each row, and each has a scale of its own.
L text tokens of width E; those after the prompt are zeros, and attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from flowkern.models.pipeline import FILE
from flowkern.models.stages import Stages
from flowkern.models.video import VideoPipeline

__all__ = ["Wan"]

FILE_2 = FILE.replace(".", "_2.")


class Wan(VideoPipeline):
    """A WanPipeline; the part of its conditioning is tokens (B, L, E)."""

    kind = WanPipeline
    lora_targets = "to_q to_k to_v to_out.0".split()

    def __init__(
        self, pipeline: WanPipeline, *, guidance_scale_2: float | None = None, **options: Any
    ) -> None:
        """guidance_scale_2: w of the second network, where there is one and guidance is asked for;
        None: that of the first.

        Raises ValueError for a pipeline without a second network.
        """
        ratio = pipeline.config.boundary_ratio
        if ratio is not None:
            if pipeline.transformer_2 is None:
                raise ValueError(f"path: has boundary_ratio {ratio}, and no transformer_2")
            self.guidance = replace(self.guidance, boundary=ratio, low=guidance_scale_2)
        elif guidance_scale_2 is not None:
            raise ValueError(
                f"guidance_scale_2: got {guidance_scale_2}, but this pipeline has one network"
            )
        # Of what it was trained on.
        self.frame_rate = 24 if pipeline.config.expand_timesteps else 16
        super().__init__(pipeline, **options)

    def whole(self, pipeline: WanPipeline) -> nn.Module:
        if not self.guidance.boundary:
            return pipeline.transformer
        return Stages(pipeline.transformer, pipeline.transformer_2)

    def cells(self) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        return config.in_channels, self.pipeline.vae_scale_factor_spatial, config.patch_size[-1]

    def frame_step(self) -> int:
        return self.pipeline.vae_scale_factor_temporal

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"tokens": tokens}

    def routed(
        self,
        network: Callable[..., Any],
        sigma: Tensor,
        sigma_host: Sequence[float] | None,
    ) -> Callable[..., Any]:
        if not self.guidance.boundary:
            return network
        levels = sigma.tolist() if sigma_host is None else sigma_host
        return partial(network, is_low=[self.guidance.is_low(level) for level in levels])

    def blank(self) -> dict[str, Tensor]:
        width = self.pipeline.transformer.config.text_dim
        return {"tokens": torch.empty(1, self.max_sequence_length, width, device="meta")}

    def call(
        self,
        network: Callable[..., tuple[Tensor]],
        x_t: Tensor,
        sigma: Tensor,
        parts: dict[str, Tensor],
    ) -> Tensor:
        """TI2V-5B takes a level per token: without an image all are the same, and one is enough."""
        return network(
            hidden_states=x_t,
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=parts["tokens"],
            return_dict=False,
        )[0]

    def to_vae(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        mean, std = latents.new_tensor([config.latents_mean, config.latents_std])
        return latents * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)

    @property
    def parts(self) -> Sequence[str]:
        return ("transformer", "transformer_2") if self.guidance.boundary else super().parts

    @property
    def lora_files(self) -> dict[str, str]:
        """The second for the pipeline's load_lora_weights(..., load_into_transformer_2=True)."""
        if not self.guidance.boundary:
            return super().lora_files
        return {"transformer.": FILE, "transformer_2.": FILE_2}
