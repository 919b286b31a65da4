"""HPS v3: how people would rate an image for a prompt (arXiv 2508.03789): Qwen2-VL with a head at a
token of its own.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowkern.rewards.resize import CLIP_MEAN, CLIP_STD, normalise, resize
from flowkern.rewards.towers import TowerReward, placed, quietly, shared
from flowkern.rewards.weights import device_of, dtype_of, file_of, folder_of, read_state, reading

__all__ = ["HpsV3", "patches", "rated_of"]

PIXELS = 256 * 28 * 28
"""Of every image, about: both the least and the most."""
TOKEN = "<|Reward|>"
CAPTION = "{text_prompt}"
BASE_FILES = ["config.json", "tokenizer*", "vocab.json", "merges.txt", "chat_template*"]


@dataclass(kw_only=True, eq=False)
class HpsV3(TowerReward):
    """The mean of the rating, mu; "log_sigma" beside, how sure the model is. It has no bounds:
    published means of models are between 0 and 11.

    It was trained in bfloat16, in which its weights have 16 GB; float32 takes 33.
    """

    path: str = "MizzenAI/HPSv3"
    """A directory or id with HPSv3.safetensors, or that file."""
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    """A directory or id with the configuration and the tokenizer; its weights are not read."""
    instruction: str | None = None
    """A file with the text that the model was trained to answer, with {text_prompt} and <|Reward|>;
    null: that of the package hpsv3, whose modules are not run: pip install --no-deps hpsv3."""
    batch: int = 8
    """Images at a time."""

    scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "raw": (1.0, 0.0),
        "unirl": (1 / 15, 0.0),
        "verl_omni": (0.1, 0.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "float16":
            raise ValueError("dtype: got 'float16', expected bfloat16, its own, or float32")
        text = _published() if self.instruction is None else _written(self.instruction)
        for part in (TOKEN, CAPTION):
            if text.count(part) != 1:
                raise ValueError(f"instruction: has {text.count(part)} {part}, expected one")
        folder = folder_of(self.base, None, BASE_FILES, "base")
        with reading("base", folder):
            self.words = _tokenizer(folder)
            self._text = self.words.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                tokenize=False,
                add_generation_prompt=True,
            )
        file = file_of(self.path, self.revision, "HPSv3.safetensors")

        def load() -> nn.Module:
            return rated_of(read_state(file), self, folder, str(file))

        key = (str(file.resolve()), str(folder.resolve()), "qwen2_vl")
        self.network = shared(key, self.dtype, self.device, load)
        config = self.network.config
        with reading("base", folder):
            self._image = self.words.convert_ids_to_tokens(config.image_token_id)
        if self._image is None or self._text.count(self._image) != 1:
            raise ValueError(f"base: its chat template writes no {self._image} for an image")

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (N, 3, H, W) and N prompts -> mu and log_sigma, (N,) each."""
        device = device_of(self.device) or images.device
        network = placed(self.network, device)
        parts = []
        for start in range(0, len(images), self.batch):
            some = slice(start, start + self.batch)
            pixels, grid = patches(images[some].to(device), network.config.vision_config)
            ids, mask = (row.to(device) for row in self.tokens(prompts[some], grid))
            reward = self.words.convert_tokens_to_ids(TOKEN)
            parts.append(network(pixels, grid, ids, mask, reward))
        mu, log_sigma = torch.cat(parts).unbind(-1)
        return mu, {"log_sigma": log_sigma}

    def tokens(self, prompts: Sequence[str], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (N, L) each, filled up on the right, for images of `grid` patches.

        Raises ValueError for a prompt that the network has no positions for: cut, it would lose the
        token at which it is rated.
        """
        merged = self.network.config.vision_config.spatial_merge_size**2
        text = self._text.replace(self._image, self._image * (grid[0] * grid[1] // merged))
        # A caption is text: its own <|...|> may not become tokens that mean something.
        texts = [text.replace(CAPTION, prompt.replace("<|", "< |")) for prompt in prompts]
        # It warns by a length of the tokenizer's own, which is another than the network's.
        rows = self.words(
            texts, padding=True, padding_side="right", return_tensors="pt", verbose=False
        )
        ids, mask = rows["input_ids"], rows["attention_mask"]
        most = self.network.config.text_config.max_position_embeddings
        if ids.shape[1] > most:
            longest = int(mask.sum(1).argmax())
            prompt = prompts[longest]
            raise ValueError(
                f"a prompt of {len(prompt)} characters is {ids.shape[1]} tokens with the image and "
                f"the instruction; expected at most {most}, the positions of its network: "
                f"{prompt!r:.80}"
            )
        return ids, mask


def patches(images: Tensor, vision: Any) -> tuple[Tensor, tuple[int, int]]:
    """uint8 (N, 3, H, W) -> the patches of all, (N * h * w, values) float32, and (h, w), as
    transformers' Qwen2VLImageProcessorPil makes them of pictures.

    Raises ValueError for images that are over 200 times as long as wide.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    size, merge = vision.patch_size, vision.spatial_merge_size
    new = smart_resize(*images.shape[-2:], size * merge, min_pixels=PIXELS, max_pixels=PIXELS)
    values = normalise(resize(images, new), CLIP_MEAN, CLIP_STD)
    high, wide = (n // size for n in new)
    values = values.view(-1, 3, high // merge, merge, size, wide // merge, merge, size)
    values = values.permute(0, 2, 5, 3, 6, 1, 4, 7)  # those that are merged stand together
    values = values[..., None, :, :].expand(*(-1,) * 6, vision.temporal_patch_size, -1, -1)
    return values.flatten(6).flatten(0, 4).flatten(1), (high, wide)


class Rated(nn.Module):
    """Qwen2-VL without its language head, and one of its own at a token."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._head = [head]  # out of reach of .to(dtype): it is float32

    @property
    def config(self) -> Any:
        return self.network.config

    def forward(
        self, pixels: Tensor, grid: tuple[int, int], ids: Tensor, mask: Tensor, token: int
    ) -> Tensor:
        """-> (N, 2) float32, at the last `token` of each row."""
        place = torch.arange(ids.shape[1], device=ids.device)
        found = self.network(
            input_ids=ids,
            attention_mask=mask,
            # One after another, patches too: so its package runs (under transformers 4.45.2), and
            # so it was trained. Qwen2-VL's in time, height and width are other scores.
            position_ids=place.expand(3, *ids.shape),
            pixel_values=pixels.to(self.network.dtype),
            image_grid_thw=ids.new_tensor([[1, *grid]]).expand(len(ids), -1),
            use_cache=False,
        ).last_hidden_state
        last = torch.where(ids == token, place, -1).amax(1)
        return self._head[0].to(found.device)(found[torch.arange(len(ids)), last].float())


def rated_of(state: Mapping[str, Tensor], reward: HpsV3, base: Path, file: str) -> Rated:
    """The network of an HPSv3.safetensors. Raises ValueError that begins with the option at fault
    for another's.
    """
    from transformers import AutoConfig, Qwen2VLConfig, Qwen2VLModel

    with reading("base", base):
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if not isinstance(config, Qwen2VLConfig):
        raise ValueError(f"base: {str(base)!r} is a {config.model_type}, expected qwen2_vl")
    inside, head = _renamed(state)
    vocabulary = len(reward.words)
    table = inside.get("language_model.embed_tokens.weight")
    if table is None or len(table) != vocabulary:
        rows = "none" if table is None else len(table)
        raise ValueError(
            f"path: {file!r} has {rows} embeddings of tokens, and base with its {TOKEN} has "
            f"{vocabulary} tokens"
        )
    config.text_config.vocab_size = vocabulary
    options = {"config": config, "state_dict": inside, "dtype": dtype_of(reward.dtype)}
    try:
        with quietly():
            network, told = Qwen2VLModel.from_pretrained(
                None, **options, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # of every kind
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"path: {file!r} cannot be loaded: {why:.200}") from None
    wrong = [
        *told["missing_keys"],
        *told["unexpected_keys"],
        *(k for k, *_ in told["mismatched_keys"]),
    ]
    if wrong:
        raise ValueError(
            f"path: {file!r} lacks {sorted(wrong)[0]}, has another, or of another size"
        )
    # Its package casts the network after it is made, and these with it: they are its own so.
    for name, frequencies in network.named_buffers():
        if name.endswith("inv_freq"):
            frequencies.copy_(frequencies.bfloat16())
    return Rated(network, _head(head, config.text_config.hidden_size, file))


def _renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of Qwen2VLModel, from names as of transformers before 4.52 or after; and of the head."""
    inside, head = {}, {}
    for name, value in state.items():
        name = name.removeprefix("model.") if name.startswith(NEW) else name
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = value
        elif name.startswith("model."):
            inside[f"language_model.{name.removeprefix('model.')}"] = value
        elif not name.startswith("lm_head."):
            inside[name] = value
    return inside, head


NEW = ("model.visual.", "model.language_model.")


def _head(state: Mapping[str, Tensor], width: int, file: str) -> nn.Module:
    """Three linear layers, numbered 0, 3 and 5: between them ReLU, and where it trained dropout."""
    try:
        sizes = [len(state[f"{i}.weight"]) for i in (0, 3, 5)]
        layers = [nn.Linear(*pair) for pair in zip([width, *sizes[:-1]], sizes, strict=True)]
        head = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        numbers = {0: 0, 3: 2, 5: 4}
        names = {f"{numbers[int(k[0])]}{k[1:]}": v for k, v in state.items()}
        head.float().load_state_dict(names)
    except (KeyError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"path: {file!r} has no rm_head of HPSv3: {why:.200}") from None
    if sizes[-1] != 2:
        raise ValueError(f"path: {file!r} rates by {sizes[-1]} numbers, expected mu and log_sigma")
    return head.eval().requires_grad_(False)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found.add_special_tokens(
        {"additional_special_tokens": [TOKEN]}, replace_extra_special_tokens=False
    )
    beside = folder / "chat_template.json"
    if not found.chat_template and beside.is_file():
        found.chat_template = json.loads(beside.read_text(encoding="utf-8"))["chat_template"]
    if not found.chat_template or found.pad_token_id is None:
        raise ValueError(f"base: {str(folder)!r} has no chat template, or no token to fill up with")
    return found


def _written(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"instruction: {file!r} cannot be read: {error}") from error


def _published() -> str:
    """The text in the installed package, read without running it: it pins other versions."""
    try:
        places = files("hpsv3") or []
        source = next(p for p in places if str(p).endswith("dataset/data_collator_qwen.py"))
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (PackageNotFoundError, StopIteration, OSError) as error:
        raise ValueError(
            "instruction: the text that HPSv3 was trained with is not here: "
            "pip install --no-deps hpsv3, or a file of it"
        ) from error
    found = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    try:
        return found["INSTRUCTION"] + found["prompt_with_special_token"]
    except KeyError as error:
        raise ValueError(f"instruction: the package hpsv3 has no {error}; give a file") from error
