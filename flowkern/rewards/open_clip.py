"""CLIP as open_clip's checkpoints name its weights -> CLIPModel of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPModel

__all__ = ["clip_of"]

RENAMED = {
    r"visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"visual\.ln_post\.": "vision_model.post_layernorm.",
    r"visual\.proj$": "visual_projection.weight",
    r"visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"token_embedding\.": "text_model.embeddings.token_embedding.",
    r"positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"ln_final\.": "text_model.final_layer_norm.",
    r"text_projection$": "text_projection.weight",
    r"transformer\.resblocks\.": "text_model.encoder.layers.",
}
"""How a name begins there -> here."""
IN_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}
TURNED = ("visual_projection.weight", "text_projection.weight")
"""Matrices that are applied from the right there."""


def clip_of(state: Mapping[str, Tensor], *, heads: int, activation: str, end: int) -> CLIPModel:
    """The two towers, float32.

    heads: of both towers, which no shape shows. activation: "gelu", or "quick_gelu" of OpenAI's
    own. end: the token at which a prompt is read. Raises ValueError for a state that is no such
    CLIP's.
    """
    from transformers import CLIPConfig, CLIPModel

    from flowkern.rewards.towers import quietly

    found = _renamed(state)
    try:
        sizes = _sizes(found)
    except KeyError as error:
        raise ValueError(f"no CLIP of open_clip: it lacks {error.args[0]}") from None
    common = {
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": sizes["out"],
    }
    text = {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    config = CLIPConfig(
        projection_dim=sizes["out"],
        text_config={**common, **text, **sizes["text"]},
        vision_config={**common, **sizes["vision"]},
    )
    with quietly():
        model, told = CLIPModel.from_pretrained(
            None,
            config=config,
            state_dict=found,
            dtype=torch.float32,
            output_loading_info=True,
        )
    wrong = sorted([*told["missing_keys"], *told["unexpected_keys"]])
    if wrong:
        raise ValueError(f"no CLIP of open_clip: {wrong[0]} is missing, or there beside")
    return model


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        start = next((old for old in RENAMED if re.match(old, name)), None)
        new = name if start is None else re.sub(f"^{start}", RENAMED[start], name)
        for old, here in IN_BLOCK.items():
            new = new.replace(old, here)
        head, packed, kind = new.partition(".attn.in_proj_")
        if packed:
            thirds = zip("qkv", value.chunk(3), strict=True)
            found |= {f"{head}.self_attn.{one}_proj.{kind}": part.clone() for one, part in thirds}
        else:
            found[new] = value.T.contiguous() if new in TURNED else value
    return found


def _sizes(found: Mapping[str, Tensor]) -> dict[str, dict[str, int] | int]:
    """What shapes show of both towers."""

    def tower(name: str) -> dict[str, int]:
        layers = f"{name}_model.encoder.layers."
        width, wide = found[f"{layers}0.mlp.fc1.weight"].T.shape
        depth = len({k[len(layers) :].partition(".")[0] for k in found if k.startswith(layers)})
        return {"hidden_size": width, "intermediate_size": wide, "num_hidden_layers": depth}

    patch = found["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    places = len(found["vision_model.embeddings.position_embedding.weight"])
    vocabulary = len(found["text_model.embeddings.token_embedding.weight"])
    length = len(found["text_model.embeddings.position_embedding.weight"])
    side = patch * round((places - 1) ** 0.5)
    return {
        "out": len(found["visual_projection.weight"]),
        "vision": {**tower("vision"), "patch_size": patch, "image_size": side},
        "text": {**tower("text"), "vocab_size": vocabulary, "max_position_embeddings": length},
    }
