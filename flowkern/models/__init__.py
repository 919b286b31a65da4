"""Models: one adapter per family over a diffusers pipeline directory. Protocol and lookup here.

An adapter is what a sampler and a trainer need of a pipeline: encode prompts, lay out noise levels,
predict a velocity, decode latents. B samples, *D one latent: (C, h, w) of an image, (C, f, h, w) of
a video, never packed; sigma 1 is noise, and a velocity is noise - clean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from flowkern.lookup import is_hub_id, load
from flowkern.models import hub
from flowkern.models.directory import read_index

__all__ = [
    "MODELS",
    "Conditioning",
    "Guidance",
    "Model",
    "guide_of",
    "load_model",
    "pipeline_class",
]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: a row of every part for each; ``conditioning[index]`` picks, repeats or
    reorders rows. On the host until it is moved, as a whole.
    """

    parts: Mapping[str, Tensor]
    """By name, (B, ...) each; text of several lengths is padded to one, the same in all of a run,
    with its mask as a part."""
    stays: tuple[str, ...] = ()
    """Parts that a network is not given but called by: they stay on the host."""

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, index: Tensor | slice | list[int]) -> Conditioning:
        """The rows of an index tensor (int64 or bool), a slice or a list."""
        return self.rows(index, index.cpu() if isinstance(index, Tensor) else index)

    def rows(self, index: Any, on_host: Any) -> Conditioning:
        """The same; on_host: the same index there, so that nothing waits for a device."""
        parts = {n: part[on_host if n in self.stays else index] for n, part in self.parts.items()}
        return replace(self, parts=parts)

    def to(self, device: torch.device | str) -> Conditioning:
        """On a device, but for what stays; the host does not wait for the copy to one."""
        is_cuda = torch.device(device).type == "cuda"

        def moved(part: Tensor) -> Tensor:
            if is_cuda and part.device.type == "cpu":
                return part.pin_memory().to(device, non_blocking=True)
            return part.to(device)

        parts = {n: part if n in self.stays else moved(part) for n, part in self.parts.items()}
        return replace(self, parts=parts)

    @staticmethod
    def cat(many: Sequence[Conditioning]) -> Conditioning:
        """The rows of all, in order; beyond the first dimension their parts agree."""
        parts = {name: torch.cat([one.parts[name] for one in many]) for name in many[0].parts}
        return replace(many[0], parts=parts)


@dataclass(frozen=True)
class Guidance:
    """How a family is guided."""

    kind: Literal["none", "cfg", "cfg_rescaled", "embedded"]
    """ "cfg": uncond + w (cond - uncond), which the step kernels fuse; "cfg_rescaled": that, with
    the length of the conditional one, which the family computes (`guide`); "embedded": an input of
    the network, and cfg on top of it where w is beyond 1; "none": w up to 1 only."""
    negative_prompt: str = ""
    """What stands for no prompt."""
    boundary: float = 0.0
    """The noise level from which on up the first of two networks is asked; 0: there is one."""
    low: float | None = None
    """w of the second network, where guidance is asked for at all; None: as of the first."""

    def is_low(self, sigma: Any) -> Any:
        """Is the second network asked? sigma: a number or a tensor. Not at the boundary, rounded to
        float32 or not."""
        return sigma < self.boundary - 2**-20

    def at(self, w: float, sigma: Tensor) -> float | Tensor:
        """w of rows at noise levels sigma (B,), where w is asked for; nothing is read from them."""
        if self.low is None or w <= 1:
            return w
        return torch.where(self.is_low(sigma), self.low, w)


FUSED = {"cfg", "embedded"}
"""Kinds of guidance that step kernels compute."""


class Model(Protocol):
    """What every adapter offers; `flowkern.models.pipeline.Pipeline` documents and shares it."""

    network: nn.Module
    base: str
    revision: str | None
    guidance: Guidance
    lora_targets: str | list[str]
    unread: Sequence[str]
    frame_rate: float | None
    calls: int

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def sigmas(self, num_steps: int) -> Tensor: ...

    def fit(self, prompts: Sequence[str]) -> None: ...

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def prepare(self, prompts: Sequence[str], folder: str | Path | None = None) -> None: ...

    def velocity(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        network: nn.Module | None = None,
        sigma_host: Sequence[float] | None = None,
    ) -> Tensor: ...

    def guide(self, v_cond: Tensor, v_uncond: Tensor, w: float | Tensor) -> Tensor: ...

    def set_attention_backend(self, name: str) -> int: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def save_lora(self, directory: str | Path) -> None: ...

    def load_lora(self, directory: str | Path) -> None: ...

    def save_network(self, directory: str | Path | None) -> None: ...

    def load_network(self, directory: str | Path) -> None: ...

    def load_encoders(self) -> None: ...

    def release_encoders(self) -> None: ...

    def describe(self) -> dict[str, Any]: ...


def guide_of(model: Model) -> Callable[[Tensor, Tensor, float, Tensor], Tensor] | None:
    """What makes one velocity of two, at a scale and noise levels sigma (B,); None: the step
    kernels do.
    """
    rule = model.guidance
    if rule.kind in FUSED and rule.low is None:
        return None
    return lambda v_cond, v_uncond, w, sigma: model.guide(v_cond, v_uncond, rule.at(w, sigma))


MODELS = {
    "ChromaPipeline": "flowkern.models.chroma:Chroma",
    "Flux2KleinPipeline": "flowkern.models.flux2:Flux2Klein",
    "Flux2Pipeline": "flowkern.models.flux2:Flux2",
    "FluxPipeline": "flowkern.models.flux:Flux",
    "HunyuanVideoPipeline": "flowkern.models.hunyuan_video:HunyuanVideo",
    "LTXPipeline": "flowkern.models.ltx:LTX",
    "QwenImagePipeline": "flowkern.models.qwen_image:QwenImage",
    "StableDiffusion3Pipeline": "flowkern.models.sd3:SD3",
    "WanPipeline": "flowkern.models.wan:Wan",
    "ZImagePipeline": "flowkern.models.z_image:ZImage",
}
"""The adapter of each diffusers pipeline class; imported only when a directory asks for it."""


def pipeline_class(path: str | Path) -> str:
    """The class named in a pipeline directory's model_index.json.

    Raises FileNotFoundError where there is no such file and ValueError where it names no class.
    """
    return read_index(path)["_class_name"]


def load_model(
    path: str | Path,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    device: torch.device | str | Mapping[str, torch.device | str] = "cpu",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    revision: str | None = None,
    text_encoders: bool = True,
    **options: Any,
) -> Model:
    """The adapter for a pipeline, by the class that its model_index.json names.

    path: a directory, or an id of the hub, OWNER/NAME, whose files are taken from the hub's cache
    and downloaded where they are not there. revision: of an id, its branch, tag or commit; None:
    its main branch. dtype, device: of all, or of parts, as `Pipeline.from_pretrained` says. height,
    width, num_frames: the size of all its latents and images, in pixels and frames; None: the
    pipeline's own. text_encoders: False loads them, and downloads a hub's, when a prompt is to be
    encoded that no cache has (`prepare`); until then they may lack. options: what the family has
    beside; None counts as not given.
    Raises FileNotFoundError for no pipeline there, ValueError for a class without an adapter, an
    option that its adapter does not take, a size that it does not have, or a device that is not
    here; TypeError for an option of another type.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path: got {path!r}, expected a directory, or an id of the hub")
    named = device if isinstance(device, Mapping) else {"default": device}
    device = {part: _device(one) for part, one in named.items()}
    commit, directory = None, Path(path)
    if is_hub_id(path):
        commit = hub.commit_of(str(path), revision)
        directory = hub.directory_of(str(path), commit, has_encoders=text_encoders)
    elif revision is not None:
        raise ValueError(
            f"revision: got {revision!r}, but {str(path)!r} is a directory; expected an id of the "
            "hub, OWNER/NAME"
        )
    name = pipeline_class(directory)
    if name not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise ValueError(f"path: {str(path)!r} is a {name}; expected one of {known}")
    family = load(name, MODELS)
    options |= {"height": height, "width": width, "num_frames": num_frames}
    options = options_of(family, options)
    found = family.from_pretrained(
        directory, dtype=dtype, device=device, has_encoders=text_encoders, **options
    )
    found.base, found.revision = str(path), commit
    return found


def options_of(family: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an adapter's constructor that are given: None counts as not given.

    Raises ValueError for one that it does not take, TypeError for one of another type.
    """
    options = {option: value for option, value in options.items() if value is not None}
    takes, name = _options(family), family.kind.__name__
    for option, value in options.items():
        if option not in takes:
            raise ValueError(f"{option}: got {value!r}, but {name} takes {', '.join(takes)} only")
        kind = TYPES.get(option)
        if kind is not None and type(value) is not kind:
            raise TypeError(f"{option}: got {value!r}, expected {kind.__name__}")
    return options


TYPES = dict.fromkeys(("height", "width", "num_frames", "max_sequence_length"), int)
TYPES |= {"negative_prompt": str, "vae_slicing": bool}


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected one of torch's, as cuda:0") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {str(device)!r}, but torch finds no CUDA device")
    return found


def _options(family: type) -> list[str]:
    """The keywords of its constructor, with those that it hands on."""
    own = [vars(kind)["__init__"] for kind in reversed(family.__mro__) if "__init__" in vars(kind)]
    every = [p for init in own for p in inspect.signature(init).parameters.values()]
    return [p.name for p in every if p.kind is p.KEYWORD_ONLY]
