"""The SD3 adapter against the plain diffusers pipeline, on the demo model."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers import FlowMatchEulerDiscreteScheduler
from loaded_once import TOKENIZERS

from flowkern.models import Conditioning, load_model
from flowkern.models.sd3 import SD3
from flowkern.rewards.digits import DigitsClassifier

ASSETS = Path(__file__).resolve().parents[2] / "assets"
DIRECTORY = ASSETS / "digits-sd3"
PROMPTS = ["a handwritten seven", "the digit 3", "a handwritten seven"]


@pytest.fixture
def model(loaded) -> SD3:
    return loaded(DIRECTORY)


def euler(model: SD3, x_t: torch.Tensor, conditioning: Conditioning, steps: int) -> torch.Tensor:
    """The ODE on the pipeline's own grid, in plain PyTorch."""
    scheduler = model.pipeline.scheduler
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):
            velocity = model.velocity(x_t, sigma.expand(len(x_t)), conditioning)
            x_t = x_t + (sigma_next - sigma) * velocity
    return x_t


def test_euler_through_the_adapter_is_the_plain_pipeline(model):
    latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    arguments = dict(num_inference_steps=10, guidance_scale=1.0, latents=latents)
    arguments["max_sequence_length"] = model.max_sequence_length
    expected = model.pipeline(PROMPTS, output_type="latent", **arguments).images
    images = model.pipeline(PROMPTS, output_type="pt", **arguments).images
    actual = euler(model, latents, model.encode(PROMPTS), 10)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    decoded = model.decode(actual)
    assert decoded.shape == (3, 3, 32, 32) and decoded.dtype == torch.float32
    assert decoded.min() >= 0 and decoded.max() <= 1
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"shift": 1.0},
        {"num_train_timesteps": 500},
        {"shift_terminal": 0.02},
        {"use_dynamic_shifting": True},
    ],
    ids=str,
)
def test_the_grid_is_the_pipelines_own(model, options, monkeypatch):
    """Recorded inside of the pipeline's own call; where the family's closed form is that grid, it
    is not rounded to float32.
    """
    from flowkern.schedules import sd3_sigmas

    kind = FlowMatchEulerDiscreteScheduler
    model.pipeline.scheduler = kind.from_config(model.pipeline.scheduler.config, **options)
    grids, network = [], model.pipeline.transformer.forward
    scale = model.pipeline.scheduler.config.num_train_timesteps

    def recorded(*arguments, timestep, **more):
        grids[-1].append(timestep[0] / scale)
        return network(*arguments, timestep=timestep, **more)

    monkeypatch.setattr(model.pipeline.transformer, "forward", recorded)
    for steps in (2, 10):
        grids.append([])
        model.pipeline("the digit 3", num_inference_steps=steps, output_type="latent")
        before = model.pipeline.scheduler.sigmas.clone()
        model.sigmas(7)
        assert torch.equal(model.pipeline.scheduler.sigmas, before), "left as it was"
        actual, expected = model.sigmas(steps), torch.stack([*grids[-1], torch.tensor(0.0)])
        assert actual.dtype == torch.float64 and actual[0] == 1
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=2e-7)
        is_closed = options.keys() == {"shift"}
        closed = sd3_sigmas(steps, model.pipeline.scheduler.config.shift)
        assert torch.equal(actual, closed) == is_closed


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_the_closed_form_is_taken_for_every_number_of_steps(model, shift):
    from flowkern.schedules import sd3_sigmas

    kind = FlowMatchEulerDiscreteScheduler
    model.pipeline.scheduler = kind.from_config(model.pipeline.scheduler.config, shift=shift)
    for steps in (*range(1, 101), 1000):
        assert torch.equal(model.sigmas(steps), sd3_sigmas(steps, shift)), steps


def test_a_scheduler_whose_levels_are_no_flow_grid_is_refused(model):
    from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler

    for scheduler, levels in (
        (FlowMatchHeunDiscreteScheduler(shift=3.0), "1, 0.9601, 0.9601"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True), "0, "),
        (DDIMScheduler(), "has no sigmas"),
    ):
        model.pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=f"path: .* scheduler.*{levels}"):
            model.sigmas(10)


def test_base_model_is_right_about_every_second_time(model):
    prompts = [json.loads(line) for line in (ASSETS / "digits-prompts/train.jsonl").open()]
    prompts = prompts[:160]
    latents = torch.randn(160, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    conditioning = model.encode([one["prompt"] for one in prompts])
    seen = DigitsClassifier().logits(model.decode(euler(model, latents, conditioning, 10)))
    asked = torch.tensor([one["digit"] for one in prompts])
    assert 0.45 <= (seen.argmax(-1) == asked).float().mean() <= 0.65


def test_a_bare_pipeline_call_draws_digits_too(model):
    """256 text tokens where the adapter uses 8: the model was trained on both."""
    prompts = [f"the number {digit}" for digit in range(10)] * 3
    generator = torch.Generator().manual_seed(0)
    images = model.pipeline(
        prompts, num_inference_steps=10, guidance_scale=1.0, generator=generator
    ).images
    assert images[0].size == (32, 32) and images[0].mode == "RGB"
    pixels = model.pipeline.image_processor.pil_to_numpy(images)
    logits = DigitsClassifier().logits(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert logits.softmax(-1).amax(-1).mean() > 0.65, "samples should look like some digit"
    seen = logits.argmax(-1) == torch.arange(10).repeat(3)
    assert seen.float().mean() > 0.35, "and depend on the prompt"


def test_rows_are_counted_and_gradients_reach_only_the_network(model):
    conditioning = model.encode(PROMPTS)
    x_t = torch.randn(3, *model.latent_shape, requires_grad=True)
    model.velocity(x_t, torch.tensor([1.0, 0.5, 0.0]), conditioning).square().mean().backward()
    with torch.no_grad():
        model.velocity(x_t[:2], torch.tensor([0.3, 0.3]), conditioning[:2])
    assert model.calls == 5
    assert x_t.grad.abs().sum() > 0
    assert model.network.proj_out.weight.grad.abs().sum() > 0
    frozen = [model.pipeline.vae, model.pipeline.text_encoder, model.pipeline.text_encoder_3]
    assert not any(p.requires_grad for module in frozen for p in module.parameters())


def test_the_size_is_fixed_at_load_and_a_network_may_be_asked_in_place_of_the_models():
    model = load_model(DIRECTORY, height=48, width=32)
    assert model.latent_shape == (1, 12, 8)
    said = model.describe()
    assert said["size"] == (48, 32) and said["elements"] == 96 and said["parameters"] > 1e5
    x_t, sigma = torch.ones(1, *model.latent_shape), torch.tensor([0.5])
    conditioning, asked = model.encode(["the digit 3"]), []

    def other(**arguments):
        asked.append(arguments["timestep"])
        return (arguments["hidden_states"] * 2,)

    assert torch.equal(model.velocity(x_t, sigma, conditioning, network=other), 2 * x_t)
    assert asked == [torch.tensor([500.0])] and model.calls == 1
    assert model.decode(x_t).shape == (1, 3, 48, 32)
    found = model.guide(torch.tensor(3.0), torch.tensor(1.0), 4.0)
    assert found == 9 and model.guidance.kind == "cfg"


def test_a_prompt_is_encoded_once(loaded, monkeypatch):
    model = loaded(DIRECTORY, TOKENIZERS)
    asked, encode = [], model.pipeline.encode_prompt
    monkeypatch.setattr(
        model.pipeline, "encode_prompt", lambda **kw: asked.extend(kw["prompt"]) or encode(**kw)
    )
    first = model.encode(PROMPTS)
    second = model.encode([PROMPTS[1], "the number 9"])
    assert asked == [PROMPTS[0], PROMPTS[1], "the number 9"]
    tokens = first.parts["tokens"]
    assert len(first) == 3 and torch.equal(tokens[0], tokens[2])
    assert not tokens.requires_grad and tokens.device.type == "cpu"
    both = Conditioning.cat([first, second])[torch.tensor([3, 0])]
    for name in ("tokens", "pooled"):
        assert torch.equal(both.parts[name], first[[1, 0]].parts[name])
    model.release_encoders()
    assert model.pipeline.text_encoder is model.pipeline.text_encoder_3 is None
    assert torch.equal(model.encode(PROMPTS).parts["tokens"], tokens), "what was encoded stays"
    with pytest.raises(ValueError, match="prompts: 'the digit 8' is new, and the encoders"):
        model.encode(["the digit 8"])


def test_a_pipeline_without_t5_keeps_the_pipelines_256_zeros_also_from_a_directory(model, tmp_path):
    model.pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    bare = SD3(model.pipeline)
    conditioning = bare.encode(["the digit 3"])
    tokens = conditioning.parts["tokens"]
    assert tokens.shape[1] == model.pipeline.tokenizer_max_length + 256
    assert tokens[:, -256:].abs().max() == 0
    model.pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    again = load_model(tmp_path).encode(["the digit 3"]).parts
    assert all(torch.equal(again[name], part) for name, part in conditioning.parts.items())


def test_errors_name_the_argument(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="path: .* has no model_index.json"):
        SD3.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixelPipeline"}')
    with pytest.raises(ValueError, match="path: .* is a PixelPipeline, expected StableDiffusion3"):
        SD3.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="path: .* is a PixelPipeline"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="max_sequence_length: got 513"):
        SD3.from_pretrained(DIRECTORY, max_sequence_length=513)
    with pytest.raises(ValueError, match="height: got 30, expected a positive multiple of 8"):
        load_model(DIRECTORY, height=30, width=32)
    with pytest.raises(ValueError, match="num_frames: got 5, but .* takes height, width, max_se"):
        load_model(DIRECTORY, num_frames=5)
    with pytest.raises(TypeError, match="prompts: got the string"):
        model.encode("the digit 3")
    conditioning, x_t = model.encode(PROMPTS), torch.zeros(3, 1, 8, 8)
    with pytest.raises(
        ValueError, match=r"sigma: got shape \(\), expected a tensor of shape \(3,\)"
    ):
        model.velocity(x_t, torch.tensor(0.5), conditioning)
    with pytest.raises(ValueError, match="conditioning: got 2 rows, expected 3"):
        model.velocity(x_t, torch.full((3,), 0.5), conditioning[:2])
    with pytest.raises(ValueError, match=r"sigma: got 0.5, expected a tensor of shape \(3,\)"):
        model.velocity(x_t, 0.5, conditioning)
    for odd in (x_t[..., :5, :5], x_t[0], x_t[:0]):  # the network answers the first with 4 x 4
        with pytest.raises(ValueError, match=r"x_t: got .*, expected \(B, 1, 8, 8\), B above 0"):
            model.velocity(odd, torch.full((3,), 0.5), conditioning)
        with pytest.raises(ValueError, match=r"latents: got .*, expected \(B, 1, 8, 8\)"):
            model.decode(odd)
    for steps in (0, 2.0, True):
        with pytest.raises(ValueError, match="num_steps: got .*, expected an integer above 0"):
            model.sigmas(steps)
    with pytest.raises(TypeError, match=r"prompts: got \[None\], expected a list of strings"):
        model.encode([None])
    with pytest.raises(ValueError, match="network: got a SD3Transf.*, expected one with an ad"):
        model.save_lora(tmp_path)
    for wrong, kind, message in (
        ({"path": 5}, TypeError, "path: got 5, expected a directory"),
        ({"height": 32.0}, TypeError, "height: got 32.0, expected int"),
        ({"dtype": torch.int32}, ValueError, "dtype: got torch.int32, expected a floating one"),
        ({"device": "nope"}, ValueError, "device: got 'nope', expected one of torch's"),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            load_model(**{"path": DIRECTORY, **wrong})


def _without(part, file):
    return lambda at: (at / part / file).unlink()


def _index(**entries):
    def change(at):
        file = at / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def _text(file, content):
    return lambda at: (at / file).write_text(content)


def _cut(file):
    return lambda at: os.truncate(at / file, (at / file).stat().st_size // 2)


def _changed(part, file, change_one):
    from safetensors.torch import load_file, save_file

    def change(at):
        weights = load_file(at / part / file)
        change_one(weights, sorted(weights)[len(weights) // 2])
        save_file(weights, at / part / file, metadata={"format": "pt"})

    return change


def _lacking_a_tensor(part, file):
    return _changed(part, file, lambda weights, name: weights.pop(name))


def _one_row(part, file):
    return _changed(part, file, lambda weights, name: weights.update({name: torch.zeros(1, 3)}))


def _words(count):
    """A tokenizer made for another encoder."""

    def change(at):
        file = at / "tokenizer_2/tokenizer.json"
        tree = json.loads(file.read_text())
        vocabulary = tree["model"]["vocab"]
        if count > len(vocabulary):
            vocabulary |= {f"extra{i}": len(vocabulary) + i for i in range(count - len(vocabulary))}
        else:
            keep = {item["content"] for item in tree["added_tokens"]}
            tree["model"]["merges"] = []
            names = [name for name in vocabulary if name not in keep][: count - len(keep)]
            tree["model"]["vocab"] = {n: i for i, n in enumerate([*names, *sorted(keep)])}
            for item in tree["added_tokens"]:
                item["id"] = tree["model"]["vocab"][item["content"]]
        file.write_text(json.dumps(tree))

    return change


BROKEN = {
    "no clip vocabulary": (_without("tokenizer", "tokenizer.json"), "tokenizer' has no vocabulary"),
    "no t5 tokenizer": (lambda at: shutil.rmtree(at / "tokenizer_3"), "lacks tokenizer_3/"),
    "too many words": (_words(600), "tokenizer_2 has 600 words and its encoder 590 rows"),
    "too few words": (_words(300), "tokenizer_2 has 300 words and its encoder 590 rows"),
    "no vae": (lambda at: shutil.rmtree(at / "vae"), "lacks vae/"),
    "no weights": (_without("vae", "diffusion_pytorch_model.safetensors"), "cannot be loaded"),
    "half a network": (
        _lacking_a_tensor("transformer", "diffusion_pytorch_model.safetensors"),
        "the weights of transformer lack",
    ),
    "half an encoder": (
        _lacking_a_tensor("text_encoder", "model.safetensors"), "the weights of text_encoder lack",
    ),
    "no safetensors": (
        lambda at: (at / "text_encoder/model.safetensors").write_bytes(b"abc"),
        "text_encoder/model.safetensors' is not whole: .*header",
    ),
    "cut short": (_cut("transformer/diffusion_pytorch_model.safetensors"), "is not whole: "),
    "no shard": (
        _text("vae/x.safetensors.index.json", '{"weight_map": {"a": "2-of-2"}}'), "lacks 2-of-2",
    ),
    "another shape": (_one_row("text_encoder", "model.safetensors"), "lack text_model[^(]*, or ha"),
    "no configuration": (_without("text_encoder_3", "config.json"), "_3' has no config.json"),
    "no length": (_without("tokenizer", "tokenizer_config.json"), "has no tokenizer_config.json"),
    "empty encoder": (_text("text_encoder_3/config.json", "{}"), "expected a model_type"),
    "empty grid": (_text("scheduler/scheduler_config.json", "{}"), "expected a _class_name"),
    "empty tokenizer": (_text("tokenizer/tokenizer_config.json", "{}"), "expected a tokenizer's"),
    "a list in a part": (_text("scheduler/scheduler_config.json", "[]"), "holds a list, expected"),
    "another family's": (_index(transformer=["diffusers", "WanX"]), "has a WanX, which no Stable"),
    "another's": (_text("vae/config.json", '{"_class_name": "VaeX"}'), "is a VaeX, and its index"),
    "null": (_index(vae=[None, None]), "model_index.json' has no vae"),
    "null scheduler": (_index(scheduler=[None, None]), "model_index.json' has no scheduler"),
    "null encoder": (_index(text_encoder=[None, None]), "model_index.json' has no text_encoder"),
    "null tokenizer": (_index(tokenizer_3=[None, None]), "model_index.json' has no tokenizer_3"),
    "another library": (_index(vae=["os", "AutoencoderKL"]), "has vae from 'os', expected"),
    "another class": (_index(text_encoder=["transformers", "NoSuch"]), "cannot be loaded"),
    "a list": (lambda at: (at / "model_index.json").write_text("[1]"), "holds a list"),
    "deep": (lambda at: (at / "model_index.json").write_text("[" * 100_000), "is not JSON"),
    "binary": (lambda at: (at / "model_index.json").write_bytes(b"\xff\x00"), "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_directory_that_is_not_whole_is_refused_in_a_line(case, tmp_path):
    """transformers makes a tokenizer of two words, and weights by lot, of what is not there."""
    pytest.importorskip("yaml")
    from flowkern.train.config import ConfigError, ModelConfig, Sampling, TrainConfig
    from flowkern.train.loading import load_pipeline

    shutil.copytree(DIRECTORY, tmp_path / "model")
    change, message = BROKEN[case]
    change(tmp_path / "model")
    model = ModelConfig(path=str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="^model.path: .*" + message) as raised:
        load_pipeline(Sampling(model=model, train=TrainConfig(steps=1)), "cpu")
    assert "\n" not in str(raised.value)
