"""Adapters without weights, by configurations alone: on the meta device, to count and to dry-run.

What an index names is made by its class from its config.json, or from a published one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowkern.lookup import is_hub_id, load
from flowkern.models import MODELS, Model, options_of
from flowkern.models.directory import CONFIGS, ENCODER, INDEX, TOKENIZER, components, read_index
from flowkern.models.published import PUBLISHED, Part, Published

__all__ = ["on_meta"]

LIMITLESS = 512
"""Tokens of a tokenizer that knows no maximum."""


@dataclass(frozen=True)
class Tokenizer:
    """What is known of one without its words."""

    model_max_length: int


def on_meta(
    path: str | Path, dtypes: Mapping[str, torch.dtype], revision: str | None = None, **options: Any
) -> Model:
    """The adapter of a pipeline directory, of an id in the hub's cache, or of a published one,
    whose modules have shapes and no values.

    dtypes: of the "network", the "vae" and by "default", as `load_model` has them. options: of the
    adapter's constructor; None counts as not given.
    Raises FileNotFoundError, of one line that begins with path, where neither is known; ValueError
    for a class without an adapter.
    """
    found = _found(path, revision)
    if found.pipeline not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise ValueError(f"path: {str(path)!r} is a {found.pipeline}; expected one of {known}")
    family = load(found.pipeline, MODELS)
    parts = {name: _made(name, part, dtypes) for name, part in found.parts.items()}
    parts |= {name: Tokenizer(length) for name, length in found.lengths.items()}
    pipeline = family.kind(**parts, **found.options)
    adapter = family(pipeline, **options_of(family, options))
    adapter.base, adapter.text_dtype = str(path), dtypes["default"]
    return adapter


def _found(path: str | Path, revision: str | None) -> Published:
    if (Path(path) / INDEX).is_file():
        return _read(Path(path))
    if not is_hub_id(path):
        read_index(path)  # says what is wrong
    from huggingface_hub import snapshot_download

    wanted = [INDEX, *(f"*/{name}" for name in set(CONFIGS.values()))]
    try:
        folder = snapshot_download(
            str(path), revision=revision, allow_patterns=wanted, local_files_only=True
        )
        return _read(Path(folder))
    except (OSError, ValueError):
        if str(path) in PUBLISHED:
            return PUBLISHED[str(path)]
    raise FileNotFoundError(
        f"path: {str(path)!r} is not in the hub's cache, and its published configuration is not "
        f"among those known here: {', '.join(PUBLISHED)}"
    )


def _read(folder: Path) -> Published:
    index = read_index(folder)
    parts, lengths = {}, {}
    for name, (_, kind, *_) in components(index).items():
        (file,) = [file for start, file in CONFIGS.items() if name.startswith(start)] or [None]
        config = {} if file is None else json.loads((folder / name / file).read_text())
        if name.startswith(TOKENIZER):
            length = config.get("model_max_length", LIMITLESS)
            lengths[name] = length if length < 10**6 else LIMITLESS
        elif file is not None:
            parts[name] = Part(kind, config)
    options = {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and not isinstance(value, list)
    }
    return Published(index["_class_name"], parts, lengths, options)


def _made(name: str, part: Part, dtypes: Mapping[str, torch.dtype]) -> Any:
    """A module on the meta device, or a scheduler."""
    import diffusers
    import transformers

    if name.startswith(ENCODER):
        kind = getattr(transformers, part.kind)
        with torch.device("meta"):
            encoder = kind(kind.config_class.from_dict(dict(part.config)))
        return _in(encoder, dtypes["default"], keeps=dtypes["default"] == torch.float16)
    kind = getattr(diffusers, part.kind)
    if not issubclass(kind, nn.Module):
        return kind.from_config(dict(part.config))
    with torch.device("meta"):
        module = kind.from_config(dict(part.config))
    return _in(module, dtypes["vae" if name == "vae" else "network"])


def _in(module: nn.Module, dtype: torch.dtype, keeps: bool = True) -> nn.Module:
    """In a dtype, but for what its class keeps in float32: transformers' loader does so where that
    is float16, diffusers' always."""
    kept = (keeps and getattr(module, "_keep_in_fp32_modules", None)) or []
    nn.Module.to(module, dtype)  # buffers, too
    for name, parameter in module.named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()
    return module.requires_grad_(True).eval()
