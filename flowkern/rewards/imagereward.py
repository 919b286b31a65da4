"""ImageReward: which of several images people prefer, for a prompt (arXiv 2304.05977), in
transformers' BLIP.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowkern.rewards.resize import (
    CLIP_MEAN,
    CLIP_STD,
    centre_crop,
    normalise,
    resize,
    short_edge,
)
from flowkern.rewards.towers import TowerReward, placed, shared
from flowkern.rewards.weights import (
    device_of,
    file_of,
    folder_of,
    linear_layers,
    read_state,
    reading,
)

__all__ = ["ImageReward", "blip_of"]

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's values on the data that it was trained on; scores are in units of that."""
LENGTH = 35
"""Word pieces of a prompt that are read, with those at its ends."""
HEAD_WIDTH = 64
"""Of the attention in the image tower; the file does not say it."""


@dataclass(kw_only=True, eq=False)
class ImageReward(TowerReward):
    """The head's value, normalised: most images are within -2 to 2."""

    path: str = "THUDM/ImageReward"
    """A directory or id with ImageReward.pt and med_config.json."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """A directory or id with the tokenizer, which path lacks."""

    scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "raw": (1.0, 0.0),
        "unirl": (1 / 4, 2 / 4),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.words = _tokenizer(self.tokenizer)
        config = _med_config(file_of(self.path, self.revision, "med_config.json"))
        file = file_of(self.path, self.revision, "ImageReward.pt")
        if config.get("vocab_size") != len(self.words):
            raise ValueError(
                f"tokenizer: {self.tokenizer!r} and its [DEC] and [ENC] are {len(self.words)} "
                f"tokens, and the network of path has {config.get('vocab_size')}"
            )

        def load() -> nn.Module:
            with reading("path", file.parent):
                return blip_of(read_state(file), config, str(file))

        self.network = shared((str(file.resolve()), "blip"), self.dtype, self.device, load)
        self._is_told = False

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (N, 3, H, W) and N prompts -> (N,), and which prompts were cut."""
        device = device_of(self.device) or images.device
        network = placed(self.network, device)
        rows, cut = self._tokens(prompts)
        parts = []
        for start in range(0, len(images), self.batch):
            some = slice(start, start + self.batch)
            pixels = pixel_values(images[some].to(device), network.side)
            parts.append(network(pixels, *(row[some].to(device) for row in rows)))
        return (torch.cat(parts) - MEAN) / STD, {"truncated": cut}

    def _tokens(self, prompts: Sequence[str]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Ids and mask, (N, 35) each, and which prompts were cut, (N,)."""
        whole = self.words(list(prompts), verbose=False)["input_ids"]
        cut = [len(ids) > LENGTH for ids in whole]
        if any(cut) and not self._is_told:
            self._is_told = True
            warnings.warn(
                f"imagereward reads the first {LENGTH} of the {len(whole[cut.index(True)])} tokens "
                f"of {prompts[cut.index(True)]!r:.80}; how many it cuts is reported as 'truncated'",
                stacklevel=2,
            )
        limits = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
        found = self.words(list(prompts), return_tensors="pt", **limits)
        return (found["input_ids"], found["attention_mask"]), torch.tensor(cut).float()


def pixel_values(images: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, side, side): Pillow's resize, torchvision's crop."""
    images = resize(images, short_edge(*images.shape[-2:], side))
    return normalise(centre_crop(images, (side, side), "torchvision"), CLIP_MEAN, CLIP_STD)


class Blip(nn.Module):
    """An image tower, a text tower that looks at it, and a head on the text's first token."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self._head = [head]  # out of reach of .to(dtype): it is float32

    @property
    def side(self) -> int:
        return self.vision.config.image_size

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, 3, side, side) float32, ids and mask (N, L) -> (N,) float32."""
        seen = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
        read = self.text(
            ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=mask.new_ones(seen.shape[:2]),
            is_decoder=False,  # that it is one in its configuration gives it the cross attention
        ).last_hidden_state[:, 0]
        return self._head[0].to(read.device)(read.float()).squeeze(-1)


# What the checkpoint calls a part of the image tower -> what transformers does.
VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embedding.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(.*)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(.*)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.(mlp\.fc[12]\..*)", r"encoder.layers.\1.\2"),
    (r"norm\.(.*)", r"post_layernorm.\1"),
)


def blip_of(state: Mapping[str, Tensor], med_config: Mapping[str, Any], file: str) -> Blip:
    """The network of an ImageReward.pt. Raises ValueError that begins with path for another's."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    def part(prefix: str) -> dict[str, Tensor]:
        found = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        return {k: v for k, v in found.items() if not k.endswith("position_ids")}

    try:
        old = part("blip.visual_encoder.")
        width, _, patch, _ = old["patch_embed.proj.weight"].shape
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(old["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=len({k.split(".")[1] for k in old if k.startswith("blocks.")}),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            image_size=patch * round((old["pos_embed"].shape[1] - 1) ** 0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,  # transformers has 1e-5
        )
        text = BlipTextConfig(
            **{**med_config, "encoder_hidden_size": width, "is_decoder": True, "use_cache": False}
        )
        towers = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        for tower, values in zip(towers, (_renamed(old), part("blip.text_encoder.")), strict=True):
            tower.load_state_dict(values)
    except (KeyError, RuntimeError) as error:  # of a strict load: which keys
        why = " ".join(str(error).split())
        raise ValueError(f"path: {file!r} is no ImageReward.pt: {why:.200}") from None
    head = linear_layers(state, "mlp.layers.", text.hidden_size, "path")
    return Blip(*towers, head)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        for old, new in VISION:
            match = re.fullmatch(old, name)
            if match:
                found[match.expand(new)] = value
                break
        else:
            raise KeyError(f"blip.visual_encoder.{name} has no counterpart in BlipVisionModel")
    return found


def _med_config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no mapping")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {str(file)!r} is no configuration: {error}") from None
    found.pop("encoder_width", None)
    return {k: v for k, v in found.items() if k not in ("architectures", "model_type")}


def _tokenizer(path: str) -> Any:
    """BERT's, with the two tokens that BLIP adds."""
    from transformers import AutoTokenizer

    files = ["tokenizer_config.json", "config.json", "tokenizer.json", "vocab.txt"]
    folder = folder_of(path, None, files, "tokenizer")
    with reading("tokenizer", folder):
        found = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    found.add_special_tokens({"bos_token": "[DEC]"})
    found.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    if found.cls_token_id is None or found.pad_token_id is None:
        raise ValueError(f"tokenizer: {path!r} has no [CLS] or [PAD]: it is not BERT's")
    return found
