"""What all families share: a diffusers pipeline as a velocity field, which an adapter completes.

B samples, *D one latent, S steps. An adapter is a subclass in a file of its own: it says which
pipeline it is for, what its parts are called, how a prompt is encoded and how the network is
called. It has no loop.
"""

from __future__ import annotations

import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowkern.models import Conditioning, Guidance, pipeline_class, weights
from flowkern.models.attention import dense_gradients
from flowkern.models.attention_backend import set_backend
from flowkern.models.compiled import Compiled, repeated
from flowkern.models.directory import (
    check_directory,
    check_index,
    check_whole,
    left_out,
    text_encoders,
)
from flowkern.models.geometry import Geometry
from flowkern.models.grids import scheduler_sigmas
from flowkern.models.quantize import count
from flowkern.models.text import Text

__all__ = [
    "ATTENTION",
    "Pipeline",
    "attention",
]

ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
"""The attention layers of a network of two streams, as LoRA targets."""


def attention(*dead: str) -> str:
    """ATTENTION as a pattern of whole names, without the layers `dead`, whose results nothing
    reads: they would get no gradient."""
    names, without = "|".join(map(re.escape, ATTENTION)), "|".join(map(re.escape, dead))
    return rf"(?!({without})$).*\.({names})"


FILE = "pytorch_lora_weights.safetensors"  # of an adapter, as diffusers names it
DECODE_PIXELS = 2**22  # per VAE call: four images of 1024 x 1024, whose activations are gigabytes


class Pipeline(Text):
    """A pipeline of images: encode, latent_shape, sigmas, velocity, decode, adapter files."""

    kind: ClassVar[type]
    """The diffusers class of the pipeline."""
    guidance = Guidance("cfg")
    lora_targets: str | list[str]
    """The layers that are adapted by default: ends of names, or a pattern of whole names."""
    unread: Sequence[str] = ()
    """Modules of the network whose results nothing reads, by their names. They get no gradient, and
    are never trained: processes that average gradients would wait for theirs."""
    optional: ClassVar[Sequence[str]] = ()
    """Parts without which it still draws."""
    parts: Sequence[str] = ("transformer",)
    """What of the pipeline the network is, as its index names it."""
    blocks: Sequence[str] = ()
    """Classes of the blocks that repeat, of a network that does not say it (`_repeated_blocks`)."""
    dispatching: ClassVar[Mapping[type, type]] = {}
    """By processors of attention that ask torch, those that ask diffusers' dispatcher."""
    compiled: Compiled | None = None
    """How the network is called, where its blocks are compiled."""

    frame_rate: float | None = None
    """Frames per second of its videos; None: it makes images."""

    network: nn.Module
    """In eval mode with its gradients on: what is trained. May be replaced by a wrapper of itself
    (peft) that takes the same call; all other modules are frozen."""
    base: str
    """The path or the id of what was loaded."""
    revision: str | None = None
    """The commit of an id of the hub."""
    calls: int
    """Of the network so far, one for every row that went forward, guidance and references too."""

    def __init__(
        self,
        pipeline: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        negative_prompt: str | None = None,
        vae_slicing: bool = False,
    ):
        """pipeline: in memory. height, width: of images, in pixels.
        max_sequence_length: tokens of a prompt. negative_prompt: what stands for no prompt. None:
        the pipeline's or the family's own. vae_slicing: decode one at a time, in the least memory.

        Raises ValueError for a size that is no positive multiple of a patch or beyond the network's
        positions, or a length that the text encoder does not have.
        """
        self.pipeline, self.network = pipeline, self.whole(pipeline).eval()
        trained = set(self.network.modules())
        for module in pipeline.components.values():
            if isinstance(module, nn.Module) and module not in trained:
                module.eval().requires_grad_(False)
        self.calls = 0
        self.base, self.directory = str(pipeline.name_or_path), None
        own = self.geometry()
        self.height = own.height if height is None else height
        self.width = own.width if width is None else width
        own.require(height=self.height, width=self.width)
        super().__init__(max_sequence_length)
        if negative_prompt is not None:
            if self.guidance.kind == "none":
                raise ValueError(
                    f"negative_prompt: got {negative_prompt!r}, but this model takes no guidance"
                )
            self.guidance = replace(self.guidance, negative_prompt=negative_prompt)
        self._is_sliced = vae_slicing
        self._dtype = pipeline.transformer.dtype  # as loaded: adapters added later may differ

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
        device: torch.device | str | Mapping[str, torch.device | str] = "cpu",
        has_encoders: bool = True,
        **options: Any,
    ):
        """Load a local directory written by diffusers; nothing is downloaded.

        dtype: of the network and the text encoders, "default" if several are named; that of the
        "network" is the same then, and the "vae" float32, because a reward should not see its
        rounding. device: of all, or the "default" and that of the "network". has_encoders: False
        leaves the text encoders to `load_encoders`, until when they may lack. options: of the
        constructor.
        Raises FileNotFoundError without a model_index.json or a part that it names, ValueError for
        another pipeline class, a tokenizer made for another encoder, or weights that are not whole.
        """
        name, expected = pipeline_class(path), cls.kind.__name__
        if name != expected:
            raise ValueError(f"path: {str(path)!r} is a {name}, expected {expected}")
        check_index(path, cls.kind, cls.optional)
        check_directory(path, without=text_encoders(path))
        dtypes = dict(dtype) if isinstance(dtype, Mapping) else {"default": dtype}
        default = dtypes.pop("default", torch.float32)
        network, vae = dtypes.pop("network", default), dtypes.pop("vae", torch.float32)
        for part in dtypes:
            raise ValueError(f"dtype: got {part!r}, expected default, network or vae")
        for one in (default, network, vae):
            if not isinstance(one, torch.dtype) or not one.is_floating_point:
                raise ValueError(f"dtype: got {one!r}, expected a floating one, as torch.bfloat16")
        pipeline = cls.kind.from_pretrained(
            path,
            dtype={"default": network, "vae": vae},
            local_files_only=True,
            use_safetensors=True,
            **left_out(path),
        )
        check_whole(pipeline)
        devices = dict(device) if isinstance(device, Mapping) else {"default": device}
        found, device = cls(pipeline, **options), devices["default"]
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                part.to(devices.get("network", device) if name in found.parts else device)
        found.directory, found.text_dtype, found._left_out = Path(path), default, device
        if has_encoders:
            found.load_encoders()
        return found

    @classmethod
    def default(cls, name: str) -> Any:
        """What the pipeline's own call takes where nothing is asked for."""
        return inspect.signature(cls.kind.__call__).parameters[name].default

    # ---- what an adapter says ----

    def whole(self, pipeline: Any) -> nn.Module:
        """The network of a pipeline."""
        return pipeline.transformer

    @abstractmethod
    def geometry(self) -> Geometry:
        """Of this pipeline."""

    @abstractmethod
    def call(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        """d x / d sigma: x_t (B, *D) in the network's dtype, sigma (B,) float32, both on its device
        as is `parts`, of a `Conditioning`.
        """

    def routed(
        self, network: nn.Module, sigma: Tensor, sigma_host: Sequence[float] | None
    ) -> Callable[..., Any]:
        """A network that is told what of noise levels the host has to know."""
        return network

    def grid_arguments(self, num_steps: int) -> dict[str, Any]:
        """What the scheduler's set_timesteps takes beside the number of steps."""
        return {}

    def closed_form(self, num_steps: int) -> Tensor | None:
        """The family's grid in float64, (S + 1,), where it is known."""
        return None

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents (B, *D) in float32 as the VAE's decoder takes them."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (config.shift_factor or 0.0)

    def vae_arguments(self, latents: Tensor) -> dict[str, Any]:
        """What the VAE's decoder takes beside latents."""
        return {}

    def to_pixels(self, decoded: Tensor) -> Tensor:
        """What the VAE's decoder gives, as images in [0, 1]."""
        return self.pipeline.image_processor.postprocess(decoded, output_type="pt")

    @property
    def lora_files(self) -> dict[str, str]:
        """For the pipeline's load_lora_weights: by what the names of the layers in each begin
        with."""
        return {"": FILE}

    # ---- what they share ----

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of one latent."""
        channels, cell, *_ = self.geometry()
        return channels, self.height // cell, self.width // cell

    @property
    def pixels(self) -> int:
        """Of one image, or of all frames of a video."""
        return self.height * self.width

    def sigmas(self, num_steps: int) -> Tensor:
        """The grid of the pipeline's own scheduler at this size, (S + 1,) float64 from exactly 1 to
        0, S = num_steps. The scheduler rounds to float32; where the family's closed form gives the
        same up to that, it is taken as it is.

        Raises ValueError for a number of steps that is none, and a scheduler whose levels are no
        such grid.
        """
        if type(num_steps) is not int or num_steps < 1:
            raise ValueError(f"num_steps: got {num_steps!r}, expected an integer above 0")
        exact = self.closed_form(num_steps)
        arguments = self.grid_arguments(num_steps)
        grid = scheduler_sigmas(self.pipeline.scheduler, num_steps, **arguments)
        is_same = exact is not None and bool((exact - grid).abs().max() <= 2**-22)
        return exact if is_same else grid

    def velocity(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        network: nn.Module | None = None,
        sigma_host: Sequence[float] | None = None,
    ) -> Tensor:
        """d x / d sigma at x_t (B, *D), noise levels sigma (B,) in [0, 1]; shaped like x_t.

        network: the one that is asked, in place of `network`: the same with a wrapper around it.
        sigma_host: the same levels on the host, for families that route rows by them.
        Computed and returned in the network's dtype; differentiable in the network's parameters
        and in x_t. Adds B to `calls`. Raises ValueError where x_t is not of this model's latents or
        the three do not have B rows.
        """
        batch = self._rows("x_t", x_t)
        if not isinstance(sigma, Tensor) or sigma.shape != (batch,):
            got = f"shape {tuple(sigma.shape)}" if isinstance(sigma, Tensor) else repr(sigma)
            raise ValueError(f"sigma: got {got}, expected a tensor of shape ({batch},) as x_t")
        if len(conditioning) != batch:
            raise ValueError(f"conditioning: got {len(conditioning)} rows, expected {batch} as x_t")
        self.calls += batch
        if x_t.is_cuda:
            dense_gradients()
        network = self.network if network is None else network
        network = self.routed(network, sigma, sigma_host)
        dtype = self._dtype  # encoders may have another, as floating masks do
        parts = {
            name: part.to(dtype) if part.is_floating_point() else part
            for name, part in conditioning.to(x_t.device).parts.items()
        }
        call = partial(self.call, network)
        if self.compiled is not None:
            return self.compiled.ask(call, x_t.to(dtype), sigma.float(), parts)
        return call(x_t.to(dtype), sigma.float(), parts)

    def guide(self, v_cond: Tensor, v_uncond: Tensor, w: float | Tensor) -> Tensor:
        """uncond + w (cond - uncond), in float32 at least; w: of all rows, or (B,)."""
        if isinstance(w, Tensor):
            w = w.reshape(-1, *[1] * (v_cond.ndim - 1))
        dtype = torch.promote_types(v_cond.dtype, torch.float32)
        return v_uncond + w * (v_cond.to(dtype) - v_uncond)

    def set_attention_backend(self, name: str) -> int:
        """Have the attention of all networks that are trained go through a backend of diffusers'
        (`AttentionBackendName`); how many modules it is of. Raises ValueError where it cannot."""
        return set_backend([getattr(self.pipeline, p) for p in self.parts], name, self.dispatching)

    def repeated(self) -> list[nn.Module]:
        """The blocks of which the network has many. Raises ValueError where they are not known."""
        return repeated(self.network, self.blocks)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *D) -> images (B, 3, H, W) in [0, 1], float32 whatever the VAE computes in;
        videos are (B, F, 3, H, W). Raises ValueError for what is not of this model's latents."""
        self._rows("latents", latents)
        # Not by the VAE's own slicing: LTX-Video's does not slice what else its decoder takes.
        rows = 1 if self._is_sliced else max(1, DECODE_PIXELS // self.pixels)
        return torch.cat([self._decode(part) for part in latents.split(rows)])

    def _rows(self, name: str, latents: Tensor) -> int:
        """B. Some networks answer another size too: SD3's, Wan's and Hunyuan's 5 x 5 with 4 x 4."""
        shape, own = tuple(latents.shape), self.latent_shape
        if shape[1:] != own or not shape[0]:
            raise ValueError(f"{name}: got shape {shape}, expected (B, {str(own)[1:]}, B above 0")
        return shape[0]

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        ready = self.to_vae(latents.float()).to(vae.dtype)
        decoded = vae.decode(ready, return_dict=False, **self.vae_arguments(ready))[0]
        return self.to_pixels(decoded.float())

    def save_lora(self, directory: str | Path) -> None:
        """Write the adapter of `network` for peft and for the pipeline's `load_lora_weights`."""
        from flowkern.models import lora  # here: peft is for training

        origin = {"base_model_name_or_path": self.base, "revision": self.revision}
        lora.write(self.network, self.kind, origin, Path(directory), self.lora_files)

    def load_lora(self, directory: str | Path) -> None:
        """Give the adapter that `network` has the weights that `save_lora` wrote.

        Raises ValueError where they are not those of this adapter.
        """
        from flowkern.models import lora

        lora.read(self.network, Path(directory))

    def save_network(self, directory: str | Path | None) -> None:
        """Write all weights of `network`, a folder for each of `parts`, as diffusers reads them.
        Where processes each have a part of them all are asked, but for one with None."""
        parts = {name: getattr(self.pipeline, name) for name in self.parts}
        weights.write(parts, None if directory is None else Path(directory))

    def load_network(self, directory: str | Path) -> None:
        """Give `network` the weights that `save_network` wrote, in its own dtype.

        Raises ValueError where they are not those of this network.
        """
        weights.read({name: getattr(self.pipeline, name) for name in self.parts}, Path(directory))

    def describe(self) -> dict[str, Any]:
        """What the model is, in plain values."""
        shape = self.latent_shape
        return {
            "pipeline": self.kind.__name__,
            "size": (self.height, self.width),
            "latent_shape": shape,
            "elements": torch.Size(shape).numel(),
            "parameters": count(self.network),
            "dtype": str(self._dtype).removeprefix("torch."),
            "guidance": self.guidance.kind,
        }
