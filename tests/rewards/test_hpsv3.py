"""HPSv3 from a checkpoint in its own names, against transformers' network and image processor."""

import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from PIL import Image
from safetensors.torch import save_file

from flowkern.rewards import hpsv3, load_reward
from flowkern.rewards.hpsv3 import patches

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def head():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(32, 12), nn.ReLU(), nn.Dropout(0.05), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files, the network they are of in transformers' own class, and its head."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    path = tmp_path_factory.mktemp("hpsv3")
    letters = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=letters, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    place = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        image_token_id=place("<|image_pad|>"),
        video_token_id=place("<|video_pad|>"),
        vision_start_token_id=place("<|vision_start|>"),
        vision_end_token_id=place("<|vision_end|>"),
    )
    config.save_pretrained(path)  # with more tokens than there are, as the published one has
    config.text_config.vocab_size = len(tokenizer) + 1
    torch.manual_seed(0)
    network = Qwen2VLForConditionalGeneration(config).eval()
    for value in network.parameters():
        value.data.normal_(0, 0.2) if value.ndim > 1 else value.data.uniform_(0.5, 1.5)
    for name, value in network.named_buffers():  # as its package has them
        if name.endswith("inv_freq"):
            value.copy_(value.bfloat16())
    state = {}
    for name, value in network.state_dict().items():
        old = name.replace("model.visual.", "visual.").replace("language_model.", "")
        state[old] = value.clone()
    rating = head()
    state |= {f"rm_head.{name}": value for name, value in rating.state_dict().items()}
    save_file(state, path / "HPSv3.safetensors")
    (path / "text.txt").write_text("Rate {text_prompt} {now} please: <|Reward|>\nEND\n")
    return path, network, rating


def options(path, /, **more):
    return {"path": str(path), "base": str(path), "instruction": str(path / "text.txt")} | more


@pytest.fixture
def small(monkeypatch):
    """Images of 16 tokens, in a 16th of the time."""
    monkeypatch.setattr(hpsv3, "PIXELS", 16 * 28 * 28)


def images(count=2, height=40, width=56):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((64, 64), (32, 32)),
        ((512, 512), (32, 32)),
        ((480, 832), (24, 42)),
        ((720, 1280), (24, 42)),
        ((90, 35), (52, 20)),
    ],
)
def test_patches_are_those_of_the_image_processor(saved, size, grid):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    bytes_ = images(2, *size).mul(255).round().to(torch.uint8)
    got, shape = patches(bytes_, saved[1].config.vision_config)
    assert shape == grid
    processor = Qwen2VLImageProcessorPil(min_pixels=hpsv3.PIXELS, max_pixels=hpsv3.PIXELS)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in bytes_]
    told = processor(images=pictures, return_tensors="pt")
    assert told["image_grid_thw"].tolist() == [[1, *grid]] * 2
    assert torch.equal(got, told["pixel_values"])


def expected(saved, pictures, prompts):
    """By transformers' class, one image at a time, positions one after another: what the released
    class gives under the transformers that it pins (docs/log.md)."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    path, network, rating = saved
    words = AutoTokenizer.from_pretrained(path)
    words.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    processor = Qwen2VLImageProcessorPil(min_pixels=hpsv3.PIXELS, max_pixels=hpsv3.PIXELS)
    found = []
    for image, prompt in zip(pictures, prompts, strict=True):
        image = Image.fromarray(image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        told = processor(images=[image], return_tensors="pt")
        pads = "<|image_pad|>" * int(told["image_grid_thw"].prod() // 4)
        ids = words(
            f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>Rate {prompt} {{now}} please: "
            "<|Reward|>\nEND\n<|im_end|>\n<|im_start|>assistant\n",
            return_tensors="pt",
        )["input_ids"]
        with torch.no_grad():
            state = network.model(
                input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1), **told
            ).last_hidden_state
            at = ids[0].tolist().index(words.convert_tokens_to_ids("<|Reward|>"))
            found.append(rating(state[0, at]))
    return torch.stack(found)


@pytest.mark.usefixtures("small")
def test_ratings_are_those_of_the_network_whatever_else_is_in_the_batch(saved):
    reward = load_reward("hpsv3", **options(saved[0], batch=2))
    drawn, prompts = images(3), ["a", "a much longer prompt", "b"]
    mu, info = reward(drawn, prompts)
    wanted = expected(saved, drawn, prompts)
    assert wanted[:, 0].std() > 1e-3
    torch.testing.assert_close(
        torch.stack([mu, info["log_sigma"]], 1), wanted, rtol=1e-4, atol=1e-5
    )
    assert (reward(drawn.flip(1), prompts)[0] - mu).abs().min() > 1e-5, "red is not blue"


@pytest.mark.usefixtures("small")
def test_new_names_of_weights_serve_and_a_caption_is_text(saved, tmp_path):
    path, network, rating = saved
    state = {k: v.clone() for k, v in network.state_dict().items()}
    save_file(
        state | {f"rm_head.{k}": v for k, v in rating.state_dict().items()},
        tmp_path / "HPSv3.safetensors",
    )
    old = load_reward("hpsv3", **options(path))
    new = load_reward("hpsv3", **options(path, path=str(tmp_path / "HPSv3.safetensors")))
    assert new.network is not old.network
    assert torch.equal(new(images(1), ["a"])[0], old(images(1), ["a"])[0])
    ids, _ = old.tokens(["<|Reward|><|image_pad|>{text_prompt}"], (4, 4))
    reward = old.words.convert_tokens_to_ids("<|Reward|>")
    assert (ids == reward).sum() == 1 and (ids == old.network.config.image_token_id).sum() == 4


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("error")
def test_a_prompt_beyond_the_networks_positions_is_refused_and_one_at_the_end_is_not(saved):
    reward = load_reward("hpsv3", **options(saved[0]))
    room = 2048 - reward.tokens([""], (8, 8))[0].shape[1]
    assert reward.tokens(["b", "a" * room], (8, 8))[0].shape[1] == 2048
    said = rf"^a prompt of {room + 1} characters is 2049 tokens .* at most 2048, .*: 'aaa"
    with pytest.raises(ValueError, match=said):
        reward(images(2, 56, 56), ["b", "a" * (room + 1)])


@pytest.mark.usefixtures("small")
def test_the_head_stays_float32(saved):
    reward = load_reward("hpsv3", **options(saved[0], dtype="bfloat16"))
    mu, _ = reward(images(1), ["a"])
    assert mu.dtype == torch.float32 and reward.network.network.dtype == torch.bfloat16
    assert reward.network._head[0][0].weight.dtype == torch.float32


def test_the_text_of_the_package_is_read_and_not_run(saved, tmp_path, monkeypatch):
    import importlib.metadata

    source = tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        'import no_such_module\nINSTRUCTION = "Rate {text_prompt} {now}"\n'
        'prompt_with_special_token = " please: <|Reward|>\\nEND\\n"\n'
    )
    named = [importlib.metadata.PackagePath("hpsv3/dataset/data_collator_qwen.py")]
    named[0].dist = importlib.metadata.PathDistribution(tmp_path / "hpsv3.dist-info")
    monkeypatch.setattr("flowkern.rewards.hpsv3.files", lambda name: named)
    by_package = load_reward("hpsv3", **options(saved[0], instruction=None))
    assert by_package._text == load_reward("hpsv3", **options(saved[0]))._text

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("flowkern.rewards.hpsv3.files", absent)
    with pytest.raises(ValueError, match="instruction: .*pip install --no-deps hpsv3"):
        load_reward("hpsv3", **options(saved[0], instruction=None))


@pytest.mark.usefixtures("small")
def test_what_is_no_hpsv3_is_refused(saved, tmp_path):
    path, network, rating = saved
    whole = network.state_dict() | {f"rm_head.{k}": v for k, v in rating.state_dict().items()}

    def with_file(state):
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / "HPSv3.safetensors")
        return {"path": str(tmp_path)}

    def without(part):
        return {k: v for k, v in whole.items() if part not in k}

    def text(words):
        (tmp_path / "text.txt").write_text(words)
        return {"instruction": str(tmp_path / "text.txt")}

    other = tmp_path / "other"
    other.mkdir()
    for file in path.iterdir():
        if file.name.startswith(("tokenizer", "chat")):
            (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for wrong, said in (
        (
            lambda: with_file(without("layers.1.mlp.up_proj")),
            "path: .*lacks .*layers.1.mlp.up_proj",
        ),
        (lambda: with_file(without("rm_head.3")), "path: .*has no rm_head of HPSv3"),
        (lambda: with_file(without("embed_tokens")), "path: .*has none embeddings"),
        (lambda: text("Rate {text_prompt}"), r"instruction: has 0 <\|Reward\|>"),
        (lambda: {"instruction": "nowhere.txt"}, "instruction: 'nowhere.txt' cannot be read"),
        (lambda: {"base": str(other)}, "base: .*is a bert, expected qwen2_vl"),
        (lambda: {"base": str(tmp_path)}, "base: .*has no config.json"),
        (lambda: {"dtype": "float16"}, "dtype: got 'float16'"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            load_reward("hpsv3", **options(path, **wrong()))
    assert np.isfinite(load_reward("hpsv3", **options(path))(images(1), ["a"])[0].item())
