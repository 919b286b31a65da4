"""Networks that rewards look through: CLIP's two towers, an image's alone; loaded once, frozen.

Rewards that name the same files, dtype and device have one network between them. Only the towers
compute in `dtype`; unit features, cosines and heads are float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from flowkern.checks import shown
from flowkern.rewards.frames import FrameReward
from flowkern.rewards.processors import PICTURES, PROCESSOR, Pixels, Words
from flowkern.rewards.weights import device_of, dtype_of, folder_of

__all__ = [
    "Clip",
    "ImageTower",
    "TowerOptions",
    "TowerReward",
    "load_clip",
    "load_network",
    "placed",
    "shared",
    "unit",
]

WEIGHTS = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
KINDS = {"clip": "CLIPModel", "dinov2": "Dinov2Model"}
"""A config.json's model_type -> the class of transformers."""


@dataclass(kw_only=True, eq=False)
class TowerOptions:
    """What every reward with a network has."""

    path: str
    """A directory as transformers' save_pretrained writes it, or an id of the hub, OWNER/NAME."""
    revision: str | None = None
    """Of an id: a branch, a tag or a commit; null: its main branch."""
    device: str | None = None
    """Where the network is; null: where the images are."""
    dtype: str = "float32"
    """Of the towers: float32, bfloat16 or float16."""
    batch: int = 32
    """Images, or prompts, at a time."""

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        device_of(self.device)
        if self.batch < 1:
            raise ValueError(f"batch: got {shown(self.batch)}, expected a whole number from 1")


@dataclass(kw_only=True, eq=False)
class TowerReward(TowerOptions, FrameReward):
    """A `FrameReward` by a network."""

    def __post_init__(self) -> None:
        TowerOptions.__post_init__(self)
        FrameReward.__post_init__(self)


_MOVING = Lock()
_NETWORKS: WeakValueDictionary[tuple[Any, ...], nn.Module] = WeakValueDictionary()


def shared(
    key: tuple[Any, ...], dtype: str, device: str | None, load: Callable[[], nn.Module]
) -> nn.Module:
    """The network of these files that is there already, or what `load` gives, frozen and in dtype;
    it goes when the last reward with it does.
    """
    key = (*key, dtype, device)
    found = _NETWORKS.get(key)
    if found is None:
        found = load().eval().requires_grad_(False)
        scale = getattr(found, "logit_scale", None)
        if scale is not None:  # no tower: bfloat16 makes its 100 a 98.9
            scale = nn.Parameter(scale.detach().float().clone(), requires_grad=False)
        found.to(dtype=dtype_of(dtype))
        if scale is not None:
            found.logit_scale = scale
        _NETWORKS[key] = found
    return found


def load_network(
    path: str, revision: str | None, dtype: str, device: str | None, *kinds: str
) -> tuple[nn.Module, Path]:
    """The network of a directory or id, and its directory. kinds: the model_types that serve.

    Raises FileNotFoundError or ValueError, of one line that begins with path or revision, for what
    is not there, not whole, or of another class.
    """
    folder = folder_of(path, revision, [*WEIGHTS, *PICTURES])
    try:
        kind = json.loads((folder / WEIGHTS[0]).read_text(encoding="utf-8"))["model_type"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"path: {path!r} has no model_type in its {WEIGHTS[0]}") from None
    if kind not in kinds:
        raise ValueError(f"path: {path!r} is a {shown(kind)}, expected {' or '.join(kinds)}")

    def load() -> nn.Module:
        import transformers

        options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # named below
        try:
            with quietly():
                found, told = getattr(transformers, KINDS[kind]).from_pretrained(folder, **options)
        except Exception as error:  # of every kind
            raise ValueError(f"path: {path!r} cannot be loaded: {_line(error)}") from error
        lacking = sorted([*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])])
        if lacking:
            raise ValueError(
                f"path: the weights of {path!r} lack {lacking[0]}, or it has a wrong shape"
            )
        return found

    return shared((str(folder.resolve()), kind), dtype, device, load), folder


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, on a device. Several threads may ask: a server has one for each reward."""
    with _MOVING:
        return network.to(device)


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars and tables: what they would tell is checked and said in a line."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def unit(features: Tensor) -> Tensor:
    """(N, D) -> float32 of length 1 each."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


@dataclass(eq=False)
class ImageTower:
    """A network that gives an image a feature."""

    network: nn.Module
    pixels: Callable[[Tensor], Tensor]
    device: torch.device | None
    batch: int

    def image_features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, D) float32 of length 1, on the network's device."""
        device = self.device or images.device
        network = placed(self.network, device)
        dtype = next(p.dtype for p in network.parameters() if p.ndim > 1)
        ask = getattr(network, "get_image_features", network)
        parts = [
            _pooled(ask(pixel_values=self.pixels(some.to(device)).to(dtype)))
            for some in images.split(self.batch)
        ]
        return unit(torch.cat(parts))


@dataclass(eq=False)
class Clip(ImageTower):
    """And one that gives a text a feature, to be compared by their cosine."""

    words: Words
    clean: Callable[[str], str] = str
    """What is done to a prompt before it is cut into tokens."""

    @property
    def logit_scale(self) -> Tensor:
        """What the published model multiplies cosines by; float32."""
        return self.network.logit_scale.exp()

    def text_features(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """(N, D) float32 of length 1, and which were cut (N,); each prompt is read once."""
        device = self.device or device
        network = placed(self.network, device)
        once = list(dict.fromkeys(prompts))
        parts, cut = [], []
        for start in range(0, len(once), self.batch):
            rows, some = self.words([self.clean(p) for p in once[start : start + self.batch]])
            rows = {name: value.to(device) for name, value in rows.items()}
            parts.append(_pooled(network.get_text_features(**rows)))
            cut.append(some)
        place = {prompt: i for i, prompt in enumerate(once)}
        index = torch.tensor([place[prompt] for prompt in prompts])
        return unit(torch.cat(parts))[index.to(device)], torch.cat(cut)[index].to(device)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (N, 3, H, W) and N prompts -> cosines (N,) float32, and which prompts were cut."""
        seen = self.image_features(images)
        read, cut = self.text_features(prompts, images.device)
        return (seen * read).sum(-1), {"truncated": cut}


def _pooled(found: Any) -> Tensor:
    """transformers 5 gives outputs; the pooler_output of a CLIP's features is projected already."""
    return found if isinstance(found, Tensor) else found.pooler_output


def load_clip(reward: TowerOptions, processor: str | None = None) -> Clip:
    """The towers that a reward's options name. processor: a directory or id with the tokenizer and
    the image processor; None: they lie with the weights.

    Raises FileNotFoundError or ValueError, of one line that begins with the option at fault.
    """
    network, _ = load_network(reward.path, reward.revision, reward.dtype, reward.device, "clip")
    key, place = "path", (reward.path, reward.revision)
    if processor is not None:
        key, place = "processor", (processor, None)
    folder = folder_of(*place, [*PROCESSOR, *PICTURES], key)
    pixels = Pixels.of(folder, key)
    side = network.config.vision_config.image_size
    if pixels.shape != (side, side):
        raise ValueError(f"{key}: makes images of {pixels.shape}, and path takes {side} x {side}")
    words = Words(folder, network.config.text_config, key)
    return Clip(network, pixels, device_of(reward.device), reward.batch, words)
