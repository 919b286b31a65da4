"""ImageReward from a checkpoint in its own names, against its network written out here."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
from PIL import Image

from flowkern.rewards import load_reward
from flowkern.rewards.imagereward import MEAN, STD, pixel_values

V, T, SIDE, PATCH, HEADS = 128, 24, 32, 16, 2  # widths of the towers; heads of both


def linear(name, out, into):
    return {f"{name}.weight": torch.randn(out, into) * 0.2, f"{name}.bias": torch.randn(out) * 0.2}


def norm(name, width):
    return {f"{name}.weight": 1 + 0.2 * torch.randn(width), f"{name}.bias": torch.randn(width)}


def checkpoint(vocabulary):
    """The names of the released file, as its modules give them; two layers each."""
    torch.manual_seed(0)
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    state = {
        f"{v}cls_token": torch.randn(1, 1, V),
        f"{v}pos_embed": torch.randn(1, 1 + (SIDE // PATCH) ** 2, V),
        f"{v}patch_embed.proj.weight": torch.randn(V, 3, PATCH, PATCH) * 0.05,
        f"{v}patch_embed.proj.bias": torch.randn(V),
        f"{t}embeddings.position_ids": torch.arange(64)[None],
        f"{t}embeddings.word_embeddings.weight": torch.randn(vocabulary, T),
        f"{t}embeddings.position_embeddings.weight": torch.randn(64, T),
        **norm(f"{t}embeddings.LayerNorm", T),
        **norm(f"{v}norm", V),
    }
    for i in range(2):
        b = f"{v}blocks.{i}."
        state |= norm(f"{b}norm1", V) | norm(f"{b}norm2", V)
        state |= linear(f"{b}attn.qkv", 3 * V, V) | linear(f"{b}attn.proj", V, V)
        state |= linear(f"{b}mlp.fc1", 48, V) | linear(f"{b}mlp.fc2", V, 48)
        b = f"{t}encoder.layer.{i}."
        for kind, into in (("attention", T), ("crossattention", V)):
            state |= linear(f"{b}{kind}.self.query", T, T)
            state |= linear(f"{b}{kind}.self.key", T, into)
            state |= linear(f"{b}{kind}.self.value", T, into)
            state |= linear(f"{b}{kind}.output.dense", T, T)
            state |= norm(f"{b}{kind}.output.LayerNorm", T)
        state |= linear(f"{b}intermediate.dense", 40, T) | linear(f"{b}output.dense", T, 40)
        state |= norm(f"{b}output.LayerNorm", T)
    sizes = {0: (20, T), 2: (16, 20), 4: (8, 16), 6: (4, 8), 7: (1, 4)}
    for i, size in sizes.items():
        state |= linear(f"mlp.layers.{i}", *size)
    return state


def attention(q, k, v, mask=None):
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def reference(state, pixels, ids, mask):
    """Scores in float64."""
    state = {name: value.double() for name, value in state.items()}

    def lin(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def ln(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    patches = state[f"{v}patch_embed.proj.weight"], state[f"{v}patch_embed.proj.bias"]
    x = F.conv2d(pixels.double(), *patches, stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{v}cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{v}pos_embed"]
    for i in range(2):
        b = f"{v}blocks.{i}."
        q, k, w = lin(f"{b}attn.qkv", ln(f"{b}norm1", x, 1e-6)).chunk(3, -1)
        x = x + lin(f"{b}attn.proj", attention(q, k, w))
        x = x + lin(f"{b}mlp.fc2", F.gelu(lin(f"{b}mlp.fc1", ln(f"{b}norm2", x, 1e-6))))
    seen = ln(f"{v}norm", x, 1e-6)
    y = state[f"{t}embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{t}embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = ln(f"{t}embeddings.LayerNorm", y, 1e-12)
    for i in range(2):
        b = f"{t}encoder.layer.{i}."
        for kind, at, m in (("attention", None, mask), ("crossattention", seen, None)):
            at = y if at is None else at
            q = lin(f"{b}{kind}.self.query", y)
            k, w = (lin(f"{b}{kind}.self.{part}", at) for part in ("key", "value"))
            out = lin(f"{b}{kind}.output.dense", attention(q, k, w, m))
            y = ln(f"{b}{kind}.output.LayerNorm", y + out, 1e-12)
        out = lin(f"{b}output.dense", F.gelu(lin(f"{b}intermediate.dense", y)))
        y = ln(f"{b}output.LayerNorm", y + out, 1e-12)
    h = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        h = lin(f"mlp.layers.{i}", h)
    return (h[:, 0] - MEAN) / STD


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from transformers import BertTokenizer

    path = tmp_path_factory.mktemp("imagereward")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(path)
    state = checkpoint(len(words) + 2)
    torch.save(state, path / "ImageReward.pt")
    config = {
        "architectures": ["BertModel"],
        "vocab_size": len(words) + 2,
        "hidden_size": T,
        "encoder_width": V,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "add_cross_attention": True,
    }
    (path / "med_config.json").write_text(json.dumps(config))
    return path, state


def by_pillow(image):
    """The released transform: torchvision's resize of a picture, its crop, its normalisation."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    width, height = picture.size
    short, long = sorted((width, height))
    edges = {short: SIDE, long: int(SIDE * long / short)}
    picture = picture.resize((edges[width], edges[height]), Image.Resampling.BICUBIC)
    left, top = (round((n - SIDE) / 2.0) for n in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + SIDE, top + SIDE))).transpose(2, 0, 1)
    mean = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)[:, None, None]
    std = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)[:, None, None]
    return torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std)


def test_pixels_are_those_of_the_released_transform():
    """Also where what is left over is odd, in which torchvision and transformers crop apart."""
    torch.manual_seed(1)
    odd = set()
    for height, width in ((40, 40), (32, 35), (64, 70), (35, 32), (50, 97), (20, 24)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        odd.add(int(SIDE * max(height, width) / min(height, width)) % 4)
        assert torch.equal(pixel_values(image[None], SIDE)[0], by_pillow(image))
    assert 3 in odd


def test_scores_are_those_of_the_released_network(saved):
    path, state = saved
    reward = load_reward("imagereward", path=str(path), tokenizer=str(path), batch=2)
    images = torch.rand(3, 3, 44, 36, generator=torch.Generator().manual_seed(2))
    prompts = ["a red cat", "b", "many letters " * 9]
    with pytest.warns(UserWarning, match="imagereward reads the first 35 of the 101 tokens"):
        scores, info = reward(images, prompts)
    assert info["truncated"].tolist() == [0, 0, 1]
    rows = reward.words(prompts, padding="longest", truncation=True, max_length=35)
    ids, mask = (torch.tensor(rows[key]) for key in ("input_ids", "attention_mask"))
    pixels = torch.stack([by_pillow(i) for i in images.mul(255).round().to(torch.uint8)])
    expected = reference(state, pixels, ids, mask)
    assert expected.std() > 0.01
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    again = load_reward("imagereward", path=str(path), tokenizer=str(path))
    assert again.network is reward.network
    torch.testing.assert_close(again(images[:2], prompts[:2])[0], scores[:2], rtol=1e-5, atol=1e-5)
    swapped = reward(images.flip(1)[:2], prompts[:2])[0]
    assert (swapped - scores[:2]).abs().min() > 1e-4, "red is not blue"


def test_a_lower_dtype_is_of_the_towers_alone(saved):
    path, _ = saved
    options = {"path": str(path), "tokenizer": str(path)}
    reward = load_reward("imagereward", **options, dtype="bfloat16")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    scores = reward(images, ["a", "b"])[0]
    assert scores.dtype == torch.float32 and reward.network.text.dtype == torch.bfloat16
    exact = load_reward("imagereward", **options)(images, ["a", "b"])[0]
    assert 0 < (scores - exact).abs().max() < 0.5 * exact.abs().max() + 0.1


def test_what_is_no_imagereward_is_refused(saved, tmp_path):
    path, state = saved

    def written(new, config=None):
        file = tmp_path / "ImageReward.pt"
        torch.save(new, file)
        told = json.loads((path / "med_config.json").read_text()) | (config or {})
        (tmp_path / "med_config.json").write_text(json.dumps(told))
        return {"path": str(tmp_path), "tokenizer": str(path)}

    lacking = {k: v for k, v in state.items() if k != "blip.visual_encoder.blocks.1.norm2.bias"}
    more = state | {"blip.visual_encoder.head.weight": torch.zeros(1)}
    broken = {"blip": nn.Linear(1, 1)}
    for options, said in (
        (lambda: {"path": str(tmp_path / "none"), "tokenizer": str(path)}, "path: .*no directory"),
        (lambda: written(lacking), "path: .*layers.1.layer_norm2.bias"),
        (lambda: written(more), "path: .*head.weight has no counterpart"),
        (lambda: written(broken), "path: .*holds no weights"),
        (lambda: written({"a": torch.zeros(1)}), "path: .*is no ImageReward.pt"),
        (lambda: written(state, {"vocab_size": 9}), "tokenizer: .*tokens, and the network of path"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            load_reward("imagereward", **options())
