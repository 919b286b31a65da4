"""Random towers in some kilobytes: directories, and checkpoints named as the published ones."""

import json
import math
from collections import OrderedDict

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE, PATCH = 28, 14
START, END = 512, 513


def tokenizer():
    """Bytes, without merges."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*signs, *(sign + "</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=dict(zip(words, range(514), strict=True)), merges=[])


def pictures(side=SIDE, **options):
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": SIDE, "width": SIDE}}
    return CLIPImageProcessorPil(**(size | options))


def clip(folder, seed=0, end=END, **vision):
    """A CLIP with its processor, whose cosines are far from each other."""
    torch.manual_seed(seed)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    common |= {"num_attention_heads": 2, "projection_dim": 16, "hidden_act": "gelu"}
    text = {"vocab_size": 514, "max_position_embeddings": 77, "pad_token_id": END}
    text |= {"bos_token_id": START, "eos_token_id": end}
    sizes = {"image_size": SIDE, "patch_size": PATCH} | vision
    model = CLIPModel(
        CLIPConfig(projection_dim=16, text_config=common | text, vision_config=common | sizes)
    )
    livened(model)
    nn.init.constant_(model.logit_scale, math.log(100))
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=pictures(), tokenizer=tokenizer()).save_pretrained(folder)
    return folder


def dino(folder):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=SIDE, patch_size=PATCH))
    livened(model)
    model.save_pretrained(folder)
    pictures(32).save_pretrained(folder)
    return folder


@torch.no_grad()
def livened(model, factor=8):
    """transformers draws weights so small that all images look alike."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.mul_(factor)


def aesthetic_head(file, width=16, seed=2):
    """As the published one is named: layers apart, dropout between."""
    torch.manual_seed(seed)
    sizes = [(width, 12), (12, 8), (8, 6), (6, 4), (4, 1)]
    layers = {f"layers.{n}": nn.Linear(*s) for n, s in zip((0, 2, 4, 6, 7), sizes, strict=True)}
    livened(nn.ModuleList(layers.values()), 3)
    state = {f"{name}.{k}": v for name, one in layers.items() for k, v in one.state_dict().items()}
    torch.save(state, file)
    return nn.Sequential(*layers.values())


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        parts = {"c_fc": nn.Linear(width, 48), "gelu": nn.GELU(), "c_proj": nn.Linear(48, width)}
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width, heads, count):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(count))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, heads, out):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, heads, 2)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP in plain torch, with open_clip's names: not through transformers at any point."""

    def __init__(self, seed=3, heads=16):
        super().__init__()
        torch.manual_seed(seed)
        self.visual = Visual(32, heads, 20)
        self.transformer = Blocks(16, heads, 1)
        self.token_embedding = nn.Embedding(514, 16)
        self.positional_embedding = nn.Parameter(torch.randn(77, 16))
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 20))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100)))

    def encode_image(self, pixels):
        return self.visual(pixels)

    def encode_text(self, ids):
        """ids (N, 77), filled up with 0; the highest one is the end."""
        mask = torch.full((77, 77), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def in_hub(cache, name, folder, commit="c" * 40):
    """A directory as the hub's cache holds the main branch of an id."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / f"snapshots/{commit}").symlink_to(folder)
    return commit


def edited(folder, name, change):
    """A JSON file of a directory, changed."""
    file = folder / name
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
