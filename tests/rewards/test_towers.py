"""Rewards on towers beside the reference's processor and model, on tiny random ones."""

import gc
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
import tiny_towers as tiny
from huggingface_hub import constants
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, Dinov2Model

from flowkern.rewards import load_reward, towers
from flowkern.rewards.frames import frame_numbers
from flowkern.rewards.groups import differences
from flowkern.rewards.hpsv2 import fit_long_edge
from flowkern.rewards.open_clip import _renamed, _sizes
from flowkern.rewards.resize import CLIP_MEAN, CLIP_STD
from flowkern.rewards.weights import read_state
from flowkern.train.config import ConfigError, Rewards
from flowkern.train.scoring import load_rewards
from flowkern.train.served import require_served, served

pytestmark = pytest.mark.filterwarnings("ignore:a reward reads the first 77")
LONG = "many words of a prompt that goes on and on, " * 3
PROMPTS = ["A red Cat  &amp; the dog", "a blue bird", LONG, "a blue bird", "x", ""]
CUT = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
NEAR = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories of every kind, and the references that are no directories."""
    root = tmp_path_factory.mktemp("towers")
    found = SimpleNamespace(root=root, clip=tiny.clip(root / "clip"), dino=tiny.dino(root / "dino"))
    found.head = tiny.aesthetic_head(root / "aesthetic-model.pth")
    found.hps = {}
    for seed, (version, name) in enumerate([(2.0, "HPS_v2"), (2.1, "HPS_v2.1")]):
        found.hps[version] = tiny.OpenClip(seed)
        state = {"state_dict": found.hps[version].state_dict(), "epoch": 1}
        torch.save(state, root / f"{name}_compressed.pt")
    clip, files = str(found.clip), str(root)
    found.options = {
        "pickscore": {"path": clip, "processor": clip},
        "clipscore": {"path": clip},
        "hpsv2": {"path": files, "processor": clip},
        "aesthetic": {"path": clip, "head": files},
        "diversity": {"path": str(found.dino)},
    }
    return found


@pytest.fixture(scope="module")
def images():
    """Not square, smooth and rough: (6, 3, 45, 33) bytes."""
    rough = torch.rand(6, 3, 45, 33, generator=torch.Generator().manual_seed(0))
    smooth = torch.rand(6, 3, 3, 2, generator=torch.Generator().manual_seed(1))
    smooth = F.interpolate(smooth, size=(45, 33), mode="bilinear")
    return (torch.cat([rough[:3], smooth[:3]]) * 255).round().to(torch.uint8)


def pictures(images):
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in images]


def reference(made, images):
    """Logits of each image and its prompt, and image features, by transformers alone."""
    processor = CLIPProcessor(tiny.pictures(), tiny.tokenizer())
    padded = {"padding": "max_length", "truncation": True, "max_length": 77}
    rows = processor(text=PROMPTS, images=pictures(images), return_tensors="pt", **padded)
    model = CLIPModel.from_pretrained(made.clip, dtype=torch.float32)
    with torch.no_grad():
        found = model(**rows)
    return found.logits_per_image.diagonal(), found.image_embeds


@pytest.mark.parametrize("batch", [1, 4])
def test_pickscore_clipscore_and_aesthetic(made, images, batch):
    logits, features = reference(made, images)
    assert logits.std() > 5, "or there is nothing to tell apart"
    for name, expected in (("pickscore", logits), ("clipscore", logits / 100)):
        scores, told = load_reward(name, batch=batch, **made.options[name])(images, PROMPTS, [])
        torch.testing.assert_close(scores, expected, **NEAR)
        assert scores.dtype == torch.float32 and told["truncated"].tolist() == CUT
    scores, told = load_reward("aesthetic", batch=batch, **made.options["aesthetic"])(
        images, PROMPTS
    )
    torch.testing.assert_close(scores, made.head(features).squeeze(1).detach(), **NEAR)
    assert scores.std() > 0.01 and told == {}


def test_pixel_values_have_no_difference_at_all(made, images):
    clip = load_reward("pickscore", **made.options["pickscore"]).clip
    expected = tiny.pictures()(pictures(images), return_tensors="pt")["pixel_values"]
    assert torch.equal(clip.pixels(images), expected)


def test_files_as_they_were_published(made, images, tmp_path):
    """Weights in half precision compute in float32, and an image processor's file of 2021 has bare
    numbers; a pickle of before zip is read too."""
    old = tmp_path / "old"
    CLIPModel.from_pretrained(made.clip, dtype=torch.float16).save_pretrained(old)
    tiny.tokenizer().save_pretrained(old)
    steps = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}
    steps |= {
        "size": tiny.SIDE,
        "crop_size": tiny.SIDE,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    (old / "preprocessor_config.json").write_text(json.dumps(steps))
    reward = load_reward("clipscore", path=str(old))
    assert {p.dtype for p in reward.clip.network.parameters()} == {torch.float32}
    expected = load_reward("clipscore", **made.options["clipscore"])
    assert torch.equal(reward.clip.pixels(images), expected.clip.pixels(images))
    found, expected = reward(images, PROMPTS)[0], expected(images, PROMPTS)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    torch.save({"a": torch.ones(2)}, old / "old.pt", _use_new_zipfile_serialization=False)
    assert read_state(old / "old.pt")["a"].tolist() == [1, 1]


def test_sizes_of_the_published_checkpoint_are_read_from_its_shapes():
    """ViT-H/14 as it is known, from a checkpoint without memory."""
    with torch.device("meta"):
        state = {
            "visual.conv1.weight": torch.empty(1280, 3, 14, 14),
            "visual.positional_embedding": torch.empty(257, 1280),
            "visual.proj": torch.empty(1280, 1024),
            "token_embedding.weight": torch.empty(49408, 1024),
            "positional_embedding": torch.empty(77, 1024),
        }
        for tower, width, depth in (("visual.", 1280, 32), ("", 1024, 24)):
            for i in range(depth):
                name = f"{tower}transformer.resblocks.{i}.mlp.c_fc.weight"
                state[name] = torch.empty(4 * width, width)
    sizes = _sizes(_renamed(state))
    assert sizes["out"] == 1024
    assert sizes["vision"] == {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "image_size": 224,
    }
    assert sizes["text"] == {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    }


@pytest.mark.parametrize("version", [2.0, 2.1])
def test_hpsv2_beside_its_towers_in_plain_torch(made, images, version):
    """Names, transposes, thirds of in_proj, activation, and the end of a prompt."""
    model = made.hps[version]
    ids = torch.zeros(len(PROMPTS), 77, dtype=torch.int64)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        some = tiny.tokenizer()(prompt.replace("&amp;", "&").strip())["input_ids"]
        some = [*some[:76], tiny.END]
        row[: len(some)] = torch.tensor(some)
    with torch.no_grad():
        seen = model.encode_image(fit_long_edge(images, tiny.SIDE))
        expected = F.cosine_similarity(seen, model.encode_text(ids))
    scores, told = load_reward("hpsv2", version=version, **made.options["hpsv2"])(images, PROMPTS)
    torch.testing.assert_close(scores, expected, **NEAR)
    assert scores.std() > 0.05 and told["truncated"].tolist() == CUT


@pytest.mark.parametrize("size", [(45, 33), (20, 31), (28, 28), (28, 13), (7, 60), (14, 3)])
def test_hpsv2_fits_the_long_edge_in_floats(size):
    """Against the steps one by one; overshoot stays, and what is filled up is black."""
    images = torch.randint(0, 2, (2, 3, *size), generator=torch.Generator().manual_seed(0)) * 255
    new = [round(n * 28 / max(size)) for n in size]
    expected = torch.zeros(2, 3, 28, 28)
    top, left = (28 - new[0]) // 2, (28 - new[1]) // 2
    expected[:, :, top : top + new[0], left : left + new[1]] = F.interpolate(
        images / 255, size=new, mode="bicubic", antialias=True
    )
    expected = (expected - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(
        3, 1, 1
    )
    assert torch.equal(fit_long_edge(images.to(torch.uint8), 28), expected)


def test_hpsv2_reads_html_and_antialiases_and_the_others_do_not(made, images):
    def score(name, prompt, **options):
        reward = load_reward(name, **made.options[name], **options)
        return reward(images[:1], [prompt])[0].item()

    assert score("hpsv2", "a &amp;amp; b") == score("hpsv2", "a & b")
    assert score("pickscore", "a &amp; b") != score("pickscore", "a & b")
    assert score("hpsv2", "a", antialias=False) != score("hpsv2", "a")
    assert score("hpsv2", "a", version=2.0) != score("hpsv2", "a")


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_diversity_is_the_mean_distance_of_pairs(made, images, kind):
    reward = load_reward("diversity", path=str(getattr(made, kind)))
    processor = tiny.pictures(32 if kind == "dino" else tiny.SIDE)
    pixels = processor(pictures(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if kind == "dino":
            f = Dinov2Model.from_pretrained(made.dino)(pixels).last_hidden_state[:, 0]
        else:
            f = CLIPModel.from_pretrained(made.clip).get_image_features(pixels).pooler_output
    distance = 1 - F.cosine_similarity(f[:, None], f[None], dim=-1)
    expected = [distance[0, [2, 4]].mean(), distance[1, 3], distance[2, [0, 4]].mean()]
    expected += [distance[3, 1], distance[4, [0, 2]].mean()]
    found = reward(images, ["same prompt"] * 6, group=[7, 3, 7, 3, 7, 9])
    torch.testing.assert_close(found[:5], torch.stack(expected), **NEAR)
    assert found[5].isnan() and type(reward).may_fail, "alone: no diversity, which is no fault"
    assert found[:5].min() > 1e-3
    by_prompt = reward(images, ["a", "b", "a", "b", "a", "c"])
    assert torch.equal(by_prompt[:5], found[:5])
    copies = reward(images[:1].expand(3, -1, -1, -1), ["a"] * 3)
    torch.testing.assert_close(copies, torch.zeros(3), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"group: got \(5,\), expected 6"):
        reward(images, ["a"] * 6, group=[0] * 5)


def test_diversity_of_a_group_by_its_formula():
    f = towers.unit(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    mean = 1 - ((f.sum(0) ** 2).sum() - 5) / 20
    torch.testing.assert_close(differences(f, torch.zeros(5)).mean(), mean)
    group = torch.tensor([0, 1, 0, 0, 2])
    near = differences(f, group, "nearest")
    expected = [min(1 - f[i] @ f[j] for j in (0, 2, 3) if j != i) for i in (0, 2, 3)]
    torch.testing.assert_close(near[[0, 2, 3]], torch.stack(expected))
    assert near[[1, 4]].isnan().all()


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "aesthetic"])
def test_colours_are_not_exchanged_and_bytes_are_floats(made, name):
    reward = load_reward(name, **made.options[name])
    red, blue = torch.zeros(2, 1, 3, 40, 40).unbind()
    red[:, 0], blue[:, 2] = 1, 1
    scores = reward(torch.cat([red, blue]), ["red"] * 2)[0]
    assert (scores[0] - scores[1]).abs() > 1e-4
    as_bytes = torch.cat([red, blue]).mul(255).to(torch.uint8)
    assert torch.equal(reward(as_bytes, ["red"] * 2)[0], scores)
    for wrong, said in ((red * 2 - 1, "from -1 to 1"), (red * 255, "from 0 to 255")):
        with pytest.raises(ValueError, match=f"images: got values {said}"):
            reward(wrong, ["red"])
    with pytest.raises(ValueError, match="prompts: got 1, expected 2"):
        reward(as_bytes, ["red"])


def test_bfloat16_is_of_the_towers_alone(made, images):
    exact = load_reward("pickscore", **made.options["pickscore"])
    rough = load_reward("pickscore", dtype="bfloat16", **made.options["pickscore"])
    assert rough.clip.network.visual_projection.weight.dtype == torch.bfloat16
    assert torch.equal(rough.clip.logit_scale, exact.clip.logit_scale)
    expected, found = exact(images, PROMPTS)[0], rough(images, PROMPTS)[0]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.std()


def test_rewards_of_the_same_files_have_one_network(made, monkeypatch):
    loads = []
    load = CLIPModel.from_pretrained
    monkeypatch.setattr(
        CLIPModel, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k)
    )
    towers._NETWORKS.clear()
    names = ("pickscore", "clipscore", "aesthetic")
    rewards = [load_reward(name, **made.options[name]) for name in names]
    rewards.append(load_reward("clipscore", **made.options["clipscore"]))
    eye = load_reward("diversity", path=str(made.clip)).tower.network
    assert {id(one.clip.network) for one in rewards} == {id(eye)} and len(loads) == 1
    other = load_reward("clipscore", dtype="float16", **made.options["clipscore"])
    assert other.clip.network is not eye and len(loads) == 2
    del rewards, eye, other
    gc.collect()
    assert not towers._NETWORKS, "it goes with the last reward that has it"


def test_a_prompt_that_is_cut_is_said_once_and_counted(made, images):
    reward = load_reward("clipscore", **made.options["clipscore"])
    with pytest.warns(UserWarning, match="a reward reads the first 77 of the 1.. tokens of 'many"):
        reward(images, PROMPTS)
    with warnings.catch_warnings(action="error"):
        assert reward(images, PROMPTS)[1]["truncated"].tolist() == CUT
    longer = [LONG + "more", *PROMPTS[1:2], LONG, *PROMPTS[3:]]
    scores = reward(images[:1].expand(6, -1, -1, -1), longer)[0]
    assert scores[0] == scores[2], "what is behind the 77 tokens is not read"


def test_each_prompt_is_read_once(made, images):
    reward = load_reward("clipscore", **made.options["clipscore"])
    rows = []
    read = reward.clip.network.get_text_features
    try:
        reward.clip.network.get_text_features = lambda **k: rows.append(k) or read(**k)
        reward(images, PROMPTS)
    finally:
        del reward.clip.network.get_text_features
    assert [len(one["input_ids"]) for one in rows] == [5]


def test_a_prompt_is_read_at_its_end(made, images, tmp_path):
    """Old configurations say 2 and mean the highest id; a vocabulary that ends otherwise would make
    all prompts one."""
    expected = load_reward("clipscore", **made.options["clipscore"])(images, PROMPTS)[0]
    old = shutil.copytree(made.clip, tmp_path / "old")
    tiny.edited(old, "config.json", lambda c: c["text_config"].update(eos_token_id=2))
    found = load_reward("clipscore", path=str(old))(images, PROMPTS)[0]
    torch.testing.assert_close(found, expected, **NEAR)
    tiny.edited(old, "config.json", lambda c: c["text_config"].update(eos_token_id=7))
    with pytest.raises(ValueError, match="path: .* ends a prompt by token 513 .* read at token 7"):
        load_reward("clipscore", path=str(old))


def test_of_a_video_some_frames(made):
    videos = torch.rand(2, 9, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "b"]
    by_frame = load_reward("clipscore", **made.options["clipscore"])
    each = torch.stack([by_frame(one, [p] * 9)[0] for one, p in zip(videos, prompts, strict=True)])
    for options, expected in (
        ({"frames": "all"}, each.mean(1)),
        ({"frames": "all", "reduce": "min"}, each.amin(1)),
        ({"frames": 3}, each[:, [0, 4, 8]].mean(1)),
        ({"reduce": "first"}, each[:, 0]),
        ({}, each[:, [0, 1, 2, 3, 5, 6, 7, 8]].mean(1)),
    ):
        scores, told = load_reward("clipscore", **made.options["clipscore"], **options)(
            videos, prompts, [{}, {}]
        )
        torch.testing.assert_close(scores, expected, **NEAR)
        assert told["truncated"].tolist() == [0, 0]
    eye = load_reward("diversity", path=str(made.clip), frames="all")
    f = towers.unit(eye.tower.image_features((videos * 255).round().byte().flatten(0, 1)))
    f = f.view(2, 9, -1).mean(1)
    expected = (1 - F.cosine_similarity(f[:1], f[1:])).expand(2)
    torch.testing.assert_close(eye(videos, ["a", "a"]), expected, **NEAR)


def test_frame_numbers():
    assert frame_numbers(81, 5) == [0, 20, 40, 60, 80]
    assert frame_numbers(3, 8) == frame_numbers(3, "all") == [0, 1, 2]
    assert frame_numbers(9, 1) == [0]


@pytest.mark.parametrize(
    ("name", "option", "file", "text"),
    [
        ("clipscore", "path", "tokenizer.json", "{}"),
        ("clipscore", "path", "tokenizer_config.json", ""),
        ("clipscore", "path", "tokenizer_config.json", "[" * 100_000),
        ("pickscore", "processor", "processor_config.json", "version https://git-lfs"),
        ("hpsv2", "processor", "tokenizer_config.json", "[]"),
        ("diversity", "path", "preprocessor_config.json", '{"crop_size": null, "size": {}}'),
        ("diversity", "path", "config.json", "[" * 100_000),
    ],
)
def test_a_file_that_is_broken_is_said_by_its_option(made, tmp_path, name, option, file, text):
    whole = made.options[name][option] if option == "path" else made.clip
    broken = shutil.copytree(whole, tmp_path / "broken")
    (broken / file).write_text(text)
    one = {"weight": 1.0} | made.options[name] | {option: str(broken)}
    with pytest.raises(ConfigError, match=rf"^reward\.{name}\.{option}: '.*broken' ") as caught:
        load_rewards(Rewards.model_validate({name: one}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pickscore", {"path": "/nowhere/clip"}, "path: '/nowhere/clip' is no directory here and"),
        ("pickscore", {"path": "{dino}"}, "path: '.*/dino' is a 'dinov2', expected clip"),
        ("pickscore", {"path": "{root}"}, "path: '.*' has no config.json"),
        ("pickscore", {"path": "{bare}"}, "path: '.*/bare' cannot be loaded: OSError: .*"),
        ("pickscore", {"path": "{broken}"}, "path: the weights of '.*/broken' lack logit_scale"),
        ("pickscore", {"processor": "{dino}"}, "processor: '.*/dino' has no tokenizer_config.json"),
        ("pickscore", {"processor": "{bare}"}, "processor: '.*/bare' has no tokenizer.json, nor"),
        ("pickscore", {"revision": "v1"}, "revision: got 'v1', but '.*/clip' is a directory"),
        ("pickscore", {"dtype": "int8"}, "dtype: got 'int8', expected one of float32, bfloat16"),
        ("pickscore", {"device": 1.5}, "device: got 1.5, expected a string or null"),
        ("clipscore", {"processor": True}, "processor: got True, expected a string or null"),
        ("digits_judge", {"directory": 7}, "directory: got 7, expected a string or"),
        ("pickscore", {"reduce": "first", "frames": 4}, "frames: got 4, but reduce: first scores"),
        ("pickscore", {"device": "abacus"}, "device: got 'abacus', which is not here: "),
        ("pickscore", {"batch": 0}, "batch: got 0, expected a whole number from 1"),
        ("pickscore", {"frames": "some"}, "frames: got 'some', expected a whole number from 1, or"),
        ("pickscore", {"reduce": "max"}, "reduce: got 'max', expected one of mean, min, first"),
        ("hpsv2", {"version": 2.2}, "version: got 2.2, expected 2.0 or 2.1"),
        ("hpsv2", {"path": "{clip}"}, "path: '.*/clip' has no HPS_v2.1_compressed.pt"),
        ("hpsv2", {"path": "{head}"}, "path: '.*.pth' is no CLIP of open_clip: it lacks vision"),
        ("hpsv2", {"path": "{text}"}, "path: '.*' holds no weights: "),
        ("aesthetic", {"head": "{hps}"}, "head: its layers layers.N do not go from 16 values of"),
        ("diversity", {"distance_to": "best"}, "distance_to: got 'best', expected mean or nearest"),
        ("diversity", {"path": "{vit}"}, "path: '.*' is a 'vit', expected dinov2 or clip"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_its_option(made, tmp_path, name, options, said):
    bare = shutil.copytree(made.clip, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    (bare / "tokenizer.json").unlink()
    places = {"clip": made.clip, "dino": made.dino, "root": made.root, "bare": bare}
    places["head"] = made.root / "aesthetic-model.pth"
    places["hps"] = made.root / "HPS_v2.1_compressed.pt"
    places["text"] = tmp_path / "weights.pt"
    places["text"].write_text("no weights")
    places["vit"] = tmp_path / "vit"
    places["vit"].mkdir()
    (places["vit"] / "config.json").write_text('{"model_type": "vit"}')
    if "{broken}" in options.values():
        from safetensors.torch import load_file, save_file

        places["broken"] = shutil.copytree(made.clip, tmp_path / "broken")
        state = load_file(places["broken"] / "model.safetensors")
        state.pop("logit_scale")
        save_file(state, places["broken"] / "model.safetensors", {"format": "pt"})
    given = {k: v.format(**places) if isinstance(v, str) else v for k, v in options.items()}
    one = {"weight": 1.0, "kind": name} | made.options.get(name, {}) | given
    with pytest.raises(ConfigError, match=rf"^reward\.mine\.{said}") as caught:
        load_rewards(Rewards.model_validate({"mine": one}))
    assert "\n" not in str(caught.value)


def test_from_the_hubs_cache_without_a_network(made, images, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = tiny.in_hub(tmp_path, "openai/clip-vit-large-patch14", made.clip)
    expected = load_reward("clipscore", **made.options["clipscore"])(images, PROMPTS)[0]
    for options in ({}, {"revision": commit}, {"revision": "main"}):
        assert torch.equal(load_reward("clipscore", **options)(images, PROMPTS)[0], expected)
    with pytest.raises(OSError, match="revision: 'v2' of 'openai/clip-.*HF_HUB_OFFLINE is set$"):
        load_reward("clipscore", revision="v2")
    name = "openai/clip-vit-large-patch14"
    own = {"kind": "pickscore", "path": str(made.clip), "processor": f"{name}@{commit}"}
    loaded = load_rewards(Rewards.model_validate({"clipscore": {}, "own": own}))
    assert served(loaded) == {"clipscore": {name: commit}, "own": {name: commit}}
    require_served(loaded, {"clipscore": {name: commit}, "own": {}})
    said = f"^reward.own: {name} is at commit {commit} and was at 2, as {name}@2 is: scores"
    with pytest.raises(ConfigError, match=said):
        require_served(loaded, {"own": {name: "2"}})
    with pytest.raises(OSError, match="^processor: 'v2' of 'openai/clip-.*HF_HUB_OFFLINE is set$"):
        load_reward("pickscore", path=str(made.clip), processor=f"{name}@v2")
    with pytest.raises(ValueError, match="^revision: got 'v1' beside 'openai/.*@v2', expected one"):
        load_reward("clipscore", path=f"{name}@v2", revision="v1")
    for options, key in (({}, "path"), ({"path": str(made.clip)}, "processor")):
        with pytest.raises(ConfigError, match=f"^reward.pickscore.{key}: .*and HF_HUB_OFFLINE is"):
            load_rewards(Rewards.model_validate({"pickscore": {"weight": 1.0, **options}}))


def test_scales_are_what_projects_do_to_the_raw_score():
    from flowkern.lookup import load
    from flowkern.rewards import REWARDS

    scales = {}
    for name in ("pickscore", "clipscore", "hpsv2", "aesthetic", "diversity"):
        kind = load(name, REWARDS)
        assert kind.default_scale in kind.scales and kind.scales["raw"] == (1, 0)
        scales[name] = kind.scales
    factor, offset = scales["pickscore"]["mixgrpo"]
    assert 22 * factor + offset == pytest.approx((22 - 18) / 8)
    assert 26 * scales["pickscore"]["flow_grpo"][0] == pytest.approx(1)
