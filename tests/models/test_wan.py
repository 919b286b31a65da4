"""What Wan alone has: its own grid, numbers of frames, and two networks that share the noise."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import tiny

from flowkern.models import guide_of, pipeline
from flowkern.models.wan import Wan
from flowkern.train.config import LoraConfig
from flowkern.train.lora import add_lora, restore_lora

SIZE = {"height": 32, "width": 64, "num_frames": 5}
GRIDS = {  # of ten steps, recorded inside of the pipelines' own calls
    "wan": [1, 0.964324, 0.923166, 0.875156, 0.81843, 0.750375, 0.667222, 0.56332, 0.429795,
            0.251872, 0],
    "wan_ti2v": [1, 0.978284, 0.952438, 0.921156, 0.882526, 0.833611, 0.769674, 0.68254, 0.556788,
                 0.359433, 0],
}  # fmt: skip


@pytest.fixture
def a14b():
    return Wan(tiny.pipeline("wan_a14b"), **SIZE, guidance_scale_2=3.0)


def rows(model, *levels):
    """x_t, sigma and conditioning of a row per level."""
    torch.manual_seed(0)
    x_t = torch.randn(len(levels), *model.latent_shape)
    return x_t, torch.tensor(levels), model.encode(["a cat", "a dog", "a seven"][: len(levels)])


@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_is_that_of_the_pipelines_unipc(name):
    """Its own call rounds the levels that the network is told to integers; here they are whole."""
    model = Wan(tiny.pipeline(name), **SIZE)
    expected = torch.tensor(GRIDS[name], dtype=torch.float64)
    torch.testing.assert_close(model.sigmas(10), expected, rtol=0, atol=1e-6)
    told = []
    model.network.register_forward_pre_hook(
        lambda _, __, inputs: told.append(inputs["timestep"]), with_kwargs=True
    )
    x_t, sigma, conditioning = rows(model, 0.875156, 0.5)
    model.velocity(x_t, sigma, conditioning)
    torch.testing.assert_close(told[0], torch.tensor([875.156, 500.0]), rtol=0, atol=1e-4)


def test_each_row_is_asked_of_the_network_for_its_level(a14b):
    """In any order, on either side alone; a level on the boundary is of the first."""
    high, low = a14b.pipeline.transformer, a14b.pipeline.transformer_2
    for levels in ((0.5, 0.874, 0.95), (0.95, 0.5, 0.875), (0.9, 0.99), (0.1, 0.2)):
        x_t, sigma, conditioning = rows(a14b, *levels)
        found = a14b.velocity(x_t, sigma, conditioning)
        for row, level in enumerate(levels):
            plain = (high if level >= 0.875 else low)(
                x_t[[row]], 1000 * sigma[[row]], conditioning[[row]].parts["tokens"]
            )
            torch.testing.assert_close(found[[row]], plain.sample, rtol=0, atol=2e-6)
        assert torch.equal(a14b.velocity(x_t, sigma, conditioning, sigma_host=levels), found)


@pytest.mark.parametrize("levels", [(0.95, 0.9), (0.5, 0.2)], ids=["high", "low"])
def test_a_network_that_no_row_is_for_has_a_gradient_of_zero(a14b, levels):
    """Processes whose rows lie on different sides average the same gradients; checkpointed."""
    network = add_lora(a14b, LoraConfig(rank=2, alpha=3))
    x_t, sigma, conditioning = rows(a14b, *levels)
    with torch.no_grad():
        old = a14b.velocity(x_t, sigma, conditioning)
    network.enable_gradient_checkpointing()
    velocity = a14b.velocity(x_t, sigma, conditioning)
    assert torch.equal(velocity, old)
    velocity.square().mean().backward()
    grads = {key: p.grad for key, p in network.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    moved = {key.split(".")[2] for key, g in grads.items() if g.any()}
    assert moved == {"transformer" if levels[0] > 0.875 else "transformer_2"}


def test_levels_that_the_host_has_are_not_read_from_the_device(a14b):
    """On tensors without data, which nothing can be read from."""
    x_t, sigma, conditioning = rows(a14b, 0.95, 0.5)
    a14b.network.to("meta")
    there = x_t.to("meta"), sigma.to("meta"), conditioning.to("meta")
    assert a14b.velocity(*there, sigma_host=[0.95, 0.5]).shape == x_t.shape
    with pytest.raises(RuntimeError, match="meta"):
        a14b.velocity(*there)


def test_each_network_has_its_own_scale(a14b):
    levels = torch.tensor([1.0, 0.875, 0.874, 0.1])
    assert a14b.guidance.at(4.0, levels).tolist() == [4, 4, 3, 3]
    assert a14b.guidance.at(1.0, levels) == 1, "no guidance is none on both sides"
    cond, uncond = torch.randn(2, 4, *a14b.latent_shape).bfloat16()
    both = guide_of(a14b)(cond, uncond, 4.0, levels)
    for row, w in enumerate((4.0, 4.0, 3.0, 3.0)):
        expected = uncond[row].float() + w * (cond[row].float() - uncond[row].float())
        torch.testing.assert_close(both[row], expected, rtol=0, atol=1e-6)
    single = Wan(a14b.pipeline, **SIZE)  # the step kernels do it
    assert guide_of(single) is None and single.guidance.at(4.0, levels) == 4


@pytest.mark.parametrize("targets", ["attn1.to_q", "transformer_2.blocks.1.attn1.to_q"])
def test_an_adapter_of_two_networks_comes_back_from_its_files(a14b, tmp_path, targets):
    """The pipeline's, and the package's own; a network without adapted layers has no file."""
    config = LoraConfig(rank=2, alpha=3, target_modules=[targets])
    network = add_lora(a14b, config)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * p.requires_grad)
    inputs = rows(a14b, 0.95, 0.5)
    a14b.save_lora(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("pytorch*"))
    own = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"]
    assert names == (own[targets.startswith("transformer_2") :])
    again, theirs = (Wan(tiny.pipeline("wan_a14b"), **SIZE) for _ in range(2))
    add_lora(again, config)
    assert not torch.equal(again.velocity(*inputs), a14b.velocity(*inputs))
    restore_lora(again, tmp_path)
    assert torch.equal(again.velocity(*inputs), a14b.velocity(*inputs))
    for name in names:
        is_second = name == own[1]
        theirs.pipeline.load_lora_weights(
            tmp_path, weight_name=name, load_into_transformer_2=is_second
        )
    assert (theirs.velocity(*inputs) - a14b.velocity(*inputs)).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 6}, "num_frames: got 6, expected 4 k . 1"),
        ({"num_frames": 0}, "num_frames: got 0, expected 4 k . 1"),
        ({"num_frames": -3}, "num_frames: got -3, expected 4 k . 1"),
        ({"width": 72}, "width: got 72, expected a positive multiple of 16"),
        ({"guidance_scale_2": 3.0}, "guidance_scale_2: got 3.0, but this pipeline has one network"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Wan(tiny.pipeline("wan"), **options)


def test_sizes_are_the_pipelines_own():
    model = Wan(tiny.pipeline("wan"))
    assert model.latent_shape == (16, 21, 60, 104) and model.describe()["elements"] == 2_096_640
    assert model.describe()["num_frames"] == 81 and model.max_sequence_length == 512
    large = Wan(tiny.pipeline("wan_ti2v"), height=704, width=1280, num_frames=121)
    assert large.describe()["elements"] == 5_237_760
    assert (model.frame_rate, large.frame_rate) == (16, 24)


def test_videos_are_decoded_a_few_at_a_time(monkeypatch):
    """By their pixels, which those of all frames are."""
    model, sizes = Wan(tiny.pipeline("wan"), **SIZE), []
    decode = model.pipeline.vae.decode
    monkeypatch.setattr(
        model.pipeline.vae, "decode", lambda z, **more: sizes.append(len(z)) or decode(z, **more)
    )
    latents = torch.randn(3, *model.latent_shape)
    for videos, expected in ((3, [3]), (2, [2, 1]), (0.5, [1, 1, 1])):
        monkeypatch.setattr(pipeline, "DECODE_PIXELS", int(videos * 5 * 32 * 64))
        sizes.clear()
        found = model.decode(latents)
        assert sizes == expected and found.shape == (3, 5, 3, 32, 64)
        torch.testing.assert_close(found[1:2], model.decode(latents[1:2]), rtol=0, atol=5e-6)
