"""What lies between a reward's images and prompts and its network: pixel values and token ids, as a
directory's processor of transformers makes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkern.rewards.resize import centre_crop, normalise, resize, short_edge
from flowkern.rewards.weights import reading

__all__ = ["PICTURES", "PROCESSOR", "Pixels", "Words"]

PROCESSOR = ["tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"]
PROCESSOR += ["special_tokens_map.json", "added_tokens.json"]
PICTURES = ["preprocessor_config.json", "processor_config.json"]
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Either makes a tokenizer; without, transformers makes one of a few words."""


@dataclass(frozen=True)
class Pixels:
    """How a directory's image processor makes pixel values of bytes, by Pillow's arithmetic."""

    size: int | tuple[int, int]
    """Of the shorter edge, or (height, width)."""
    crop: tuple[int, int] | None
    method: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, folder: Path, key: str) -> Pixels:
        """Raises ValueError, naming the option `key`, for a directory without one, and for steps
        that are not these.
        """
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        if not any((folder / name).is_file() for name in PICTURES):
            raise ValueError(f"{key}: {str(folder)!r} has no {PICTURES[0]}")
        with reading(key, folder):
            told = CLIPImageProcessorPil.from_pretrained(folder)
            edge = told.size.shortest_edge
            size = edge or (told.size.height, told.size.width)
            crop = (told.crop_size.height, told.crop_size.width) if told.do_center_crop else None
            method = {2: "bilinear", 3: "bicubic"}.get(told.resample)
            least = (edge, edge) if edge else size
            steps = [
                told.do_resize,
                told.do_rescale,
                told.do_normalize,
                method,
                crop or not edge,
                *least,
            ]
            steps += [c and n and c <= n for c, n in zip(crop or least, least, strict=True)]
            if not all(steps) or abs(told.rescale_factor * 255 - 1) > 1e-6:
                raise ValueError(
                    f"{key}: {str(folder)!r} prepares images in another way; expected a bicubic or "
                    "bilinear resize, a centre crop, a scale of 1/255, and a mean and std"
                )
            return cls(size, crop, method, tuple(told.image_mean), tuple(told.image_std))

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        return self.crop or self.size

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 3, *shape)."""
        size = self.size
        if not isinstance(size, tuple):
            size = short_edge(*images.shape[-2:], size)
        images = resize(images, size, self.method)
        if self.crop is not None:
            images = centre_crop(images, self.crop)
        return normalise(images, self.mean, self.std)


class Words:
    """Prompts as the ids that a CLIP text tower reads: `length` at most, the rest is cut off."""

    def __init__(self, folder: Path, text: Any, key: str) -> None:
        """text: the tower's configuration. Raises ValueError, naming the option `key`, for a
        directory without a vocabulary, or with one that is not the tower's.
        """
        from transformers import AutoTokenizer

        if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
            raise ValueError(
                f"{key}: {str(folder)!r} has no tokenizer.json, nor vocab.json and merges.txt"
            )
        with reading(key, folder):
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        self.length = text.max_position_embeddings
        # The tower is read where the end token stands first, or, where its configuration still
        # says 2, at the highest id: another token there, and every prompt is the same to it.
        with reading(key, folder):
            last, end = max(self.tokenizer.get_vocab().values()), self.tokenizer.eos_token_id
        wanted = last if text.eos_token_id == 2 else text.eos_token_id
        if end != wanted or last >= text.vocab_size:
            raise ValueError(
                f"{key}: {str(folder)!r} ends a prompt by token {end} of {last + 1}, and the text "
                f"tower is read at token {wanted} of {text.vocab_size}"
            )
        self._is_told = False

    def __call__(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """-> what a text tower takes, padded to the longest, and which prompts were cut, (N,)."""
        known = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        cut = [len(ids) > self.length for ids in known]
        if any(cut) and not self._is_told:
            self._is_told = True
            first = cut.index(True)
            warnings.warn(
                f"a reward reads the first {self.length} of the {len(known[first])} tokens of "
                f"{prompts[first]!r:.80}; how many it cuts is reported as 'truncated'",
                stacklevel=2,
            )
        rows = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask")
        return {name: rows[name] for name in names}, torch.tensor(cut, dtype=torch.float32)
