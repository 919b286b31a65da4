"""Stable Diffusion 3 and 3.5.

Everything is read from the pipeline directory: text encoders (with or without T5), latent channels,
resolution, the VAE's scaling. L text tokens of width E: CLIP's and T5's together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from flowkern.models.pipeline import Pipeline, dynamic_mu
from flowkern.schedules import sd3_sigmas

__all__ = ["SD3"]


class SD3(Pipeline):
    """A StableDiffusion3Pipeline; the parts of its conditioning are tokens (B, L, E) and pooled
    (B, P).
    """

    kind = StableDiffusion3Pipeline
    lora_targets: ClassVar[list[str]] = (
        "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
    )

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        """max_sequence_length: T5 tokens (zeros where there is no T5), 0 to 512; None: the T5
        tokenizer's own maximum, at most 256, which is 256 for SD3.5, as diffusers has it.
        """
        super().__init__(pipeline, height=height, width=width)
        t5 = pipeline.tokenizer_3 if pipeline.text_encoder_3 is not None else None
        if max_sequence_length is None:
            max_sequence_length = 256 if t5 is None else min(256, t5.model_max_length)
        least = 0 if t5 is None else 1  # its tokenizer takes no 0
        if not least <= max_sequence_length <= 512:
            raise ValueError(
                f"max_sequence_length: got {max_sequence_length}, expected {least} to 512"
            )
        self.max_sequence_length = max_sequence_length

    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"tokens": tokens, "pooled": pooled}

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
