"""Stable Diffusion 3 and 3.5: encode, latent_shape, sigmas, velocity, decode.

Everything is read from the pipeline directory: text encoders (with or without T5), latent channels,
resolution, the VAE's scaling. B samples, L text tokens, (C, h, w) a latent, D = C * h * w.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from flowkern.models import Conditioning, pipeline_class
from flowkern.models.pipeline import check_directory, check_vocabulary, check_whole, load_encoders
from flowkern.schedules import sd3_sigmas

__all__ = ["SD3"]

ENCODE_ROWS = 32  # prompts per text encoder call
DECODE_PIXELS = 2**22  # per VAE call: four images of 1024 x 1024, whose activations are gigabytes
PLACES = ("", "_2", "_3")  # of the text encoders and their tokenizers: CLIP, CLIP, T5
CACHED_PROMPTS = 1024  # 2.7 MB each with T5-XXL in bf16
SCHEDULER = {  # of the grids that sd3_sigmas gives
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
}


class SD3:
    """A StableDiffusion3Pipeline as a velocity field."""

    network: torch.nn.Module
    """The transformer, in eval mode with its gradients on: what is trained. May be replaced by a
    wrapper of itself (peft, DDP) that takes the same call; all other modules are frozen."""
    rows: int
    """Rows sent forward through `network` so far, guidance and reference passes included."""

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, *, max_sequence_length: int | None = None
    ) -> None:
        """pipeline: in memory and on its device. max_sequence_length: as in `from_pretrained`."""
        if max_sequence_length is None:
            max_sequence_length = 256
            if pipeline.text_encoder_3 is not None:
                max_sequence_length = min(256, pipeline.tokenizer_3.model_max_length)
        least = 0 if pipeline.text_encoder_3 is None else 1  # its tokenizer takes no 0
        if not least <= max_sequence_length <= 512:
            raise ValueError(
                f"max_sequence_length: got {max_sequence_length}, expected {least} to 512"
            )
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module) and module is not pipeline.transformer:
                module.eval().requires_grad_(False)
        self.pipeline = pipeline
        self.network = pipeline.transformer.eval()
        self.max_sequence_length = max_sequence_length
        self.rows = 0
        self._dtype = pipeline.transformer.dtype  # as loaded: adapters added later may differ
        self._encoded: OrderedDict[str, Conditioning] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_sequence_length: int | None = None,
    ) -> "SD3":
        """Load a local directory written by diffusers; nothing is downloaded.

        dtype: of the transformer and the text encoders; the VAE is always float32, because a
        reward should not see its rounding. max_sequence_length: T5 tokens (zeros where there is no
        T5), 0 to 512; None means the T5 tokenizer's own maximum, at most 256, which is 256 for
        SD3.5, as the diffusers pipeline has it.
        Raises FileNotFoundError without a model_index.json or a part that it names, ValueError for
        another pipeline class, a tokenizer made for another encoder, or weights that are not whole.
        """
        name = pipeline_class(path)
        if name != StableDiffusion3Pipeline.__name__:
            raise ValueError(f"path: {str(path)!r} is a {name}, expected StableDiffusion3Pipeline")
        check_directory(path)
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            path,
            dtype={"default": dtype, "vae": torch.float32},
            local_files_only=True,
            use_safetensors=True,
            **load_encoders(path, ["text_encoder" + place for place in PLACES], dtype),
        )
        check_whole(pipeline)
        for place in PLACES:
            name, encoder = f"tokenizer{place}", f"text_encoder{place}"
            check_vocabulary(name, getattr(pipeline, name), getattr(pipeline, encoder))
        return cls(pipeline.to(device), max_sequence_length=max_sequence_length)

    @property
    def shift(self) -> float:
        """The scheduler's sigma shift, for ``schedules.sd3_sigmas``; 3.0 for SD3 and SD3.5."""
        return float(self.pipeline.scheduler.config.shift)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> tokens (B, L, E), L the CLIP and T5 lengths together, and pooled (B, P).

        Each distinct prompt is encoded once and remembered (the latest 1,024 of them).
        Raises TypeError for a bare string and ValueError for no prompts.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts: got the string {prompts!r}, expected a list of strings")
        if not prompts:
            raise ValueError("prompts: got none, expected at least one")
        rows = {prompt: self._encoded[prompt] for prompt in prompts if prompt in self._encoded}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
        for start in range(0, len(missing), ENCODE_ROWS):
            part = missing[start : start + ENCODE_ROWS]
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=part,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            # Cloned: a slice would keep the whole batch alive in the cache.
            for row, prompt in enumerate(part):
                here = slice(row, row + 1)
                rows[prompt] = Conditioning(tokens[here].clone(), pooled[here].clone())
        self._encoded.update(rows)
        while len(self._encoded) > CACHED_PROMPTS:
            self._encoded.popitem(last=False)
        return Conditioning.cat([rows[prompt] for prompt in prompts])

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, h, w) of one latent; height and width in pixels, by default the pipeline's own.

        Raises ValueError for a size that is no positive multiple of a patch.
        """
        scale = self.pipeline.vae_scale_factor
        config = self.pipeline.transformer.config
        default = config.sample_size * scale
        unit = config.patch_size * scale
        size = {"height": height or default, "width": width or default}
        for name, pixels in size.items():
            if pixels <= 0 or pixels % unit:
                raise ValueError(f"{name}: got {pixels}, expected a positive multiple of {unit}")
        return config.in_channels, size["height"] // scale, size["width"] // scale

    def sigmas(self, num_steps: int) -> Tensor:
        """The grid of the pipeline's own scheduler, (S + 1,) float64 from 1 to 0, S = num_steps.

        Raises ValueError for a scheduler whose grid is another than SD3's.
        """
        scheduler = self.pipeline.scheduler
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        for name, expected in SCHEDULER.items():
            value = config.get(name, expected)
            if value != expected:
                raise ValueError(
                    f"path: the pipeline's scheduler has {name}={value!r}, expected {expected!r}"
                )
        return sd3_sigmas(num_steps, self.shift)

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """d x / d sigma at x_t (B, C, h, w), noise levels sigma (B,) in [0, 1]; shaped like x_t.

        Computed and returned in the network's dtype; differentiable in the network's parameters
        and in x_t. Adds B to `rows`. Raises ValueError where the three do not have B rows.
        """
        batch = len(x_t)
        if sigma.shape != (batch,):
            raise ValueError(f"sigma: got shape {tuple(sigma.shape)}, expected ({batch},) as x_t")
        if len(conditioning) != batch:
            raise ValueError(f"conditioning: got {len(conditioning)} rows, expected {batch} as x_t")
        self.rows += batch
        return self.network(
            hidden_states=x_t.to(self._dtype),
            timestep=sigma.float() * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditioning.tokens,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        vae = self.pipeline.vae
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        pixels = latents.shape[-2] * latents.shape[-1] * self.pipeline.vae_scale_factor**2
        images = [
            vae.decode(part.to(vae.dtype) / scale + shift, return_dict=False)[0]
            for part in latents.split(max(1, DECODE_PIXELS // pixels))
        ]
        return self.pipeline.image_processor.postprocess(torch.cat(images), output_type="pt")
