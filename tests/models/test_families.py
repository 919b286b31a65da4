"""Every family against its own pipeline, on tiny ones: solver, grid, images, adapters, rows of
batches, gradients. What is wrong in an adapter (a sign, a unit, a statistic) fails here by far.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import tiny
import tiny_text
from diffusers import FlowMatchEulerDiscreteScheduler

import flowkern as fk
from flowkern.checks import ConfigError
from flowkern.models import MODELS, Conditioning, load_model
from flowkern.models.compiled import repeated
from flowkern.models.directory import check_vocabulary
from flowkern.models.flux2 import Flux2Klein
from flowkern.schedules import step_coefficients
from flowkern.train.config import LoraConfig
from flowkern.train.lora import add_lora
from flowkern.train.trained import set_trained

PROMPTS = ["a red cat", "an old photo of the small blue dog on a seven"]  # of two lengths
PIXELS = {"height": 64, "width": 48}
VIDEO = {"height": 32, "width": 64, "num_frames": 5}
STEPS = 4


@dataclass(frozen=True)
class Family:
    scales: tuple[float, ...]
    """w of none, and of the family's default."""
    guided: Any
    """w -> the arguments of the pipeline's own call."""
    shared: dict[str, Any]
    """Arguments of every call."""
    size: dict[str, int] = field(default_factory=lambda: PIXELS)
    options: dict[str, Any] = field(default_factory=dict)
    """The adapter's."""
    shift: float | None = None
    """Of an Euler scheduler in the place of the pipeline's own, which is no Euler."""


FAMILIES = {
    "sd3": Family(
        (1.0, 4.5), lambda w: {"guidance_scale": w}, {"max_sequence_length": 256}
    ),
    "flux": Family(
        (1.0, 2.0),
        lambda w: {"true_cfg_scale": w, "negative_prompt": [""] * len(PROMPTS)},
        {"guidance_scale": 3.5},
    ),
    "qwen_image": Family(
        (1.0, 4.0), lambda w: {"true_cfg_scale": w, "negative_prompt": [" "] * len(PROMPTS)}, {}
    ),
    "flux2": Family((1.0,), lambda w: {}, {"guidance_scale": 4.0}),
    "klein": Family((1.0, 4.0), lambda w: {"guidance_scale": w}, {}),
    "z_image": Family((1.0, 5.0), lambda w: {"guidance_scale": w - 1}, {}),
    "chroma": Family((1.0, 5.0), lambda w: {"guidance_scale": w}, {}),
    "wan": Family((1.0, 5.0), lambda w: {"guidance_scale": w}, {}, VIDEO, shift=3.0),
    "wan_a14b": Family(
        (1.0, 4.0), lambda w: {"guidance_scale": w, "guidance_scale_2": 3.0}, {}, VIDEO,
        {"guidance_scale_2": 3.0}, shift=3.0,
    ),
    "wan_ti2v": Family((1.0, 5.0), lambda w: {"guidance_scale": w}, {}, VIDEO, shift=3.0),
    "ltx": Family((1.0, 3.0), lambda w: {"guidance_scale": w}, {}, VIDEO | {"num_frames": 9}),
    "hunyuan_video": Family(
        (1.0, 2.0), lambda w: {"true_cfg_scale": w, "negative_prompt": [""] * len(PROMPTS)},
        {"guidance_scale": 6.0}, VIDEO,
    ),
}  # fmt: skip
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def load(directories, loaded):
    def model(name, **options):
        family = FAMILIES[name]
        found = loaded(directories(name), **family.size | family.options | options)
        found.pipeline.set_progress_bar_config(disable=True)
        return found

    return model


def latents(model):
    return torch.randn(
        len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0)
    )


@torch.no_grad()
def euler(model, x_t, scale, steps=STEPS):
    """The ODE with guidance, in plain PyTorch."""
    conditioning = model.encode([*PROMPTS, model.guidance.negative_prompt])
    rows, uncond = conditioning[: len(x_t)], conditioning[[-1] * len(x_t)]
    for sigma, sigma_next in pairwise(model.sigmas(steps).float()):
        level = sigma.expand(len(x_t))
        velocity = model.velocity(x_t, level, rows)
        if scale > 1:
            w = model.guidance.at(scale, level)
            velocity = model.guide(velocity, model.velocity(x_t, level, uncond), w)
        x_t = x_t + (sigma_next - sigma) * velocity
    return x_t


def test_every_family_is_tried():
    assert {tiny.PIPELINES[name]().__class__.__name__ for name in FAMILIES} == set(MODELS)


@pytest.fixture
def compared(load):
    """compared(name): a model and the arguments of its pipeline's own call at a scale of guidance,
    both with an Euler scheduler."""

    def of(name):
        model, family = load(name), FAMILIES[name]
        if family.shift is not None:
            model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=family.shift)

        def options(scale):
            own = {"num_inference_steps": STEPS, **family.size, **family.shared}
            given = {"latents": tiny.as_given(model.pipeline, latents(model))}
            return own | family.guided(scale) | given

        return model, options

    return of


@every_family
def test_euler_and_decoding_are_the_pipelines_own(name, compared):
    """In float32, with and without guidance; the grid is the one its network is asked at."""
    (model, options), family = compared(name), FAMILIES[name]
    for scale in family.scales:
        found = euler(model, latents(model), scale)
        mine = model.to_vae(found)
        seen, images = tiny.called(model.pipeline, PROMPTS, options(scale), instead=mine)
        grid = model.pipeline.scheduler.sigmas.double()
        assert torch.equal(model.sigmas(STEPS)[1:].float(), grid[1:].float())
        assert model.sigmas(STEPS)[0] == 1 and abs(grid[0] - 1) < 1e-5
        unit = (model.to_vae(found + 1) - mine).abs().amax().item()  # of a latent, for the VAE
        torch.testing.assert_close(mine, seen, rtol=0, atol=5e-6 * unit)
        torch.testing.assert_close(model.decode(found), images, rtol=0, atol=1e-6)
        frames = [n for name, n in family.size.items() if name == "num_frames"]
        size = (family.size["height"], family.size["width"])
        assert images.shape == (len(PROMPTS), *frames, 3, *size) and images.std() > 0.01


@every_family
def test_what_is_wrong_in_an_adapter_shows(name, compared, monkeypatch):
    """A sign, a unit, a statistic or a scale that is not the pipeline's is no rounding."""
    model, options = compared(name)
    x_t, scale = latents(model), FAMILIES[name].scales[-1]
    right = model.to_vae(euler(model, x_t, scale, 2))
    two = options(scale) | {"num_inference_steps": 2}
    seen, _ = tiny.called(model.pipeline, PROMPTS, two, instead=right)
    call, to_vae, guide = model.call, model.to_vae, model.guide
    shift = to_vae(torch.zeros_like(x_t))
    unit = to_vae(torch.ones_like(x_t)) - shift
    wrong = [
        ("call", lambda net, x, sigma, *more: -call(net, x, sigma, *more)),
        ("call", lambda net, x, sigma, *more: call(net, x, 1000 * sigma, *more)),
        ("call", lambda net, x, sigma, *more: call(net, x, 1 - sigma, *more)),
        ("call", lambda net, x, *more: call(net, x.flip(-1), *more).flip(-1)),
        ("to_vae", lambda x: (to_vae(x) - shift) / unit + shift),
    ]
    if shift.any():
        wrong += [("to_vae", lambda x: to_vae(x) - shift)]
    if scale > 1:
        wrong += [("guide", lambda cond, uncond, w: guide(cond, uncond, w + 1))]
        wrong += [("guide", lambda cond, uncond, w: guide(uncond, cond, w))]
    if model.guidance.kind == "cfg_rescaled":
        wrong += [("guide", lambda cond, uncond, w: uncond + w * (cond - uncond))]
    if getattr(model, "guidance_embedding", None):
        embedding = model.embedding
        wrong += [("embedding", lambda sigma: 2 * embedding(sigma))]
    for index, (what, mutant) in enumerate(wrong):
        with monkeypatch.context() as patch:
            patch.setattr(model, what, mutant)
            found = model.to_vae(euler(model, x_t, scale, 2))
        assert (found - seen).abs().max() > 1e-3, (what, index)


@every_family
def test_a_row_is_the_same_in_a_batch_of_other_lengths_and_noise_levels(name, load):
    model = load(name)
    x_t, sigma = latents(model), torch.tensor([0.9, 0.2])
    both = model.encode(PROMPTS)
    assert not torch.equal(*both.parts["tokens"])
    with torch.no_grad():
        together = model.velocity(x_t, sigma, both)
        alone = [model.velocity(x_t[[i]], sigma[[i]], both[[i]]) for i in (0, 1)]
        again = [model.velocity(x_t[[i]], sigma[[i]], model.encode([PROMPTS[i]])) for i in (0, 1)]
    for found in (alone, again):
        torch.testing.assert_close(torch.cat(found), together, rtol=0, atol=2e-6)
    assert (together[0] - together[1]).abs().max() > 1e-2


@every_family
def test_a_run_is_fitted_to_its_longest_prompt(name, load):
    """Where a network does not look at padding, it is left out and changes nothing."""
    model, asked = load(name), load(name, max_sequence_length=64, text_encoders=False)
    assert asked.pipeline.text_encoder is None
    x_t, sigma = latents(model), torch.tensor([0.9, 0.2])
    before = model.encode(PROMPTS)
    for each in (model, asked):
        each.fit([*PROMPTS, each.guidance.negative_prompt])
    after = model.encode(PROMPTS)
    length, own = (each.parts["tokens"].shape[1] for each in (after, before))
    assert asked.max_sequence_length == 64 and asked.pipeline.text_encoder is None
    asked.encode(PROMPTS[:1])
    assert not any(p.requires_grad for p in asked.pipeline.text_encoder.parameters())
    counted = model.tokens_of(PROMPTS)
    assert (counted is None) == (length == own)
    if counted is None:
        return
    assert length == model.max_sequence_length == -(-max(counted) // 16) * 16
    assert max(counted) > min(counted)
    with torch.no_grad():
        velocities = [model.velocity(x_t, sigma, each) for each in (before, after)]
    torch.testing.assert_close(*velocities, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="prompts: 'a cat a cat.* longer than .* fitted to, of"):
        model.encode(["a cat " * 60])
    with pytest.raises(ValueError, match="prompts: 'a cat a cat.* tokens, expected at most"):
        model.fit(["a cat " * 600])


@every_family
def test_activations_that_are_recomputed_change_nothing(name, load):
    model = load(name)
    network = add_lora(model, LoraConfig(rank=2, alpha=4))
    rows, x_t, sigma = model.encode(PROMPTS), latents(model), torch.tensor([0.9, 0.3])
    found, seen, blocks = [], [], repeated(network, model.blocks)
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: seen.append(block))
    for is_recomputed in (False, True):
        if is_recomputed:
            network.enable_gradient_checkpointing()
            seen.clear()
        pair = [model.velocity(x_t, sigma, rows[order]) for order in ([0, 1], [1, 0])]
        sum(each.square().mean() for each in pair).backward()
        gradients = [p.grad for p in network.parameters() if p.requires_grad]
        found.append([each.detach() for each in (*pair, *gradients)])
        network.zero_grad()
    assert all(map(torch.equal, *found))
    once_more = [b for b in blocks if type(b).__name__.endswith("TransformerBlock")]
    assert once_more and all(seen.count(b) == 2 * len(pair) for b in once_more), "block by block"


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ratio_is_one_before_the_first_update(name, load, dtype):
    """Replayed as it was sampled, with gradients on; in both precisions bit for bit. A row alone
    has that velocity but for rounding: 2e-6, or a last place of bfloat16 of the largest."""
    model = load(name, dtype=dtype)
    add_lora(model, LoraConfig(rank=2, alpha=4))
    rows = model.encode(PROMPTS)
    step = step_coefficients(model.sigmas(STEPS), "flow_sde", 0.7)[torch.tensor([0, 2])]
    sigma = model.sigmas(STEPS)[[0, 2]].float()
    x_t = latents(model)
    with torch.no_grad():
        old = model.velocity(x_t, sigma, rows)
        alone = torch.cat([model.velocity(x_t[[i]], sigma[[i]], rows[[i]]) for i in (0, 1)])
        x_next, log_prob = fk.sde_step(x_t, old, step, seed=1, sample_id=torch.arange(2), step=0)
    atol = 2e-6 if dtype == torch.float32 else 2**-7 * old.abs().max().item()
    torch.testing.assert_close(alone, old, rtol=0, atol=atol)
    velocity = model.velocity(x_t, sigma, rows)
    assert velocity.dtype == dtype and torch.equal(velocity, old)
    assert torch.equal(fk.sde_log_prob(x_t, velocity, x_next, step), log_prob)
    advantage = torch.tensor([1.0, -1.0])
    out = fk.policy_loss(velocity, x_t, x_next, step, advantage, old_velocity=old)
    assert (out.ratio == 1).all()
    out.loss.backward()
    gradients = [p.grad for p in model.network.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@every_family
def test_every_lora_parameter_learns_and_the_pipeline_loads_them(name, load, tmp_path):
    """Its file has weights times alpha / rank, which rounds nothing where that is a power of 2."""
    model = load(name)
    torch.manual_seed(0)  # of the adapter: whatever tests came before
    network = add_lora(model, LoraConfig(rank=2, alpha=4))
    adapted = {key: p for key, p in network.named_parameters() if p.requires_grad}
    assert adapted
    with torch.no_grad():
        for p in adapted.values():
            p.add_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1
            )
    rows, x_t, sigma = model.encode(PROMPTS), latents(model), torch.tensor([0.9, 0.3])
    velocity = model.velocity(x_t, sigma, rows)
    velocity.square().mean().backward()
    dead = [key for key, p in adapted.items() if p.grad is None or not p.grad.any()]
    assert not dead
    model.save_lora(tmp_path)
    plain = load(name)
    bare = plain.velocity(x_t, sigma, rows)
    for number, file in enumerate(model.lora_files.values()):
        into = {"load_into_transformer_2": True} if number else {}
        plain.pipeline.load_lora_weights(tmp_path, weight_name=file, **into)
    found = plain.velocity(x_t, sigma, rows)
    assert torch.equal(found, velocity) and not torch.allclose(bare, velocity, atol=1e-3)


@every_family
def test_all_weights_learn_and_diffusers_reads_them(name, load, tmp_path):
    """But for modules that nothing reads, and those that say so are all of these."""
    model = load(name)
    assert set_trained(model, None).endswith("all of the network, in float32")
    rows, x_t, sigma = model.encode(PROMPTS), latents(model), torch.tensor([0.9, 0.3])
    model.velocity(x_t, sigma, rows).square().mean().backward()
    network = model.network
    unread = {n for n, p in network.named_parameters() if not p.requires_grad}
    assert unread == {n for n, p in network.named_parameters() if p.grad is None}
    assert bool(unread) == bool(model.unread)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.01 * torch.randn_like(p))
        velocity = model.velocity(x_t, sigma, rows)
    model.save_network(tmp_path)
    again, kinds = load(name), {part: type(getattr(model.pipeline, part)) for part in model.parts}
    read = {part: kind.from_pretrained(tmp_path / part) for part, kind in kinds.items()}
    for part, found in read.items():
        own = getattr(model.pipeline, part).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in found.state_dict().items())
    again.load_network(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.velocity(x_t, sigma, rows), velocity)


@every_family
def test_slices_of_a_vae_are_the_whole_and_bfloat16_comes_close(name, load):
    model, sliced = load(name), load(name, vae_slicing=True)
    halved = load(name, dtype={"vae": torch.bfloat16})
    assert {p.dtype for p in halved.pipeline.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in halved.network.parameters()} == {torch.float32}
    rows = {}
    for each in (model, sliced):
        seen = rows.setdefault(each, [])
        each.pipeline.vae.decoder.register_forward_hook(
            lambda _, inputs, __, seen=seen: seen.append(len(inputs[0]))
        )
    x = latents(model)
    images = model.decode(x)
    torch.testing.assert_close(sliced.decode(x), images, rtol=0, atol=1e-5)
    assert set(rows[model]) == {len(x)} and set(rows[sliced]) == {1}
    found = halved.decode(x)
    assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
    # Random weights enlarge rounding: .5 to 10 % of the images' spread, where wrong is 140 %.
    assert 0 < (found - images).square().mean().sqrt() < 0.15 * images.std()


def test_layers_that_nothing_reads_are_left_out_of_any_targets(load):
    model = load("qwen_image")
    config = LoraConfig(rank=1, target_modules=["to_add_out", "txt_mlp.net.2", "to_q"])
    said = set_trained(model, config)
    assert said.endswith("of rank 1 in 4 layers: to_add_out 1, txt_mlp.net.2 1, to_q 2")
    rows, x_t, sigma = model.encode(PROMPTS), latents(model), torch.tensor([0.9, 0.3])
    model.velocity(x_t, sigma, rows).square().mean().backward()
    assert all(p.grad is not None for p in model.network.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="lora.target_modules: '1.attn.to_add_out' is no layer"):
        set_trained(load("qwen_image"), LoraConfig(target_modules=["to_q", "1.attn.to_add_out"]))


@every_family
def test_a_family_says_how_many_layers_are_adapted(name, load):
    model = load(name)
    said = set_trained(model, LoraConfig(rank=2))
    adapted = [
        n for n, _ in model.network.named_parameters() if n.endswith("lora_A.default.weight")
    ]
    counts = dict(pair.rsplit(" ", 1) for pair in said.rpartition(": ")[2].split(", "))
    assert f"in {len(adapted)} layers: " in said
    assert sum(map(int, counts.values())) == len(adapted) and "0" not in counts.values()


def test_videos_have_the_pipelines_own_size_and_rate(directories):
    ltx, hunyuan = (load_model(directories(name)) for name in ("ltx", "hunyuan_video"))
    assert (ltx.num_frames, ltx.latent_shape) == (161, (16, 21, 16, 22))
    assert (hunyuan.num_frames, hunyuan.latent_shape) == (129, (16, 33, 90, 160))
    assert (ltx.frame_rate, hunyuan.frame_rate) == (25, 24)
    assert (ltx.max_sequence_length, hunyuan.max_sequence_length) == (128, 256)
    assert hunyuan.guidance_embedding == 6 and load_model(directories("flux")).frame_rate is None


def test_mistakes_are_named(load):
    with pytest.raises(ValueError, match="height: got 60, expected a positive multiple of 16"):
        load("flux", height=60)
    with pytest.raises(ValueError, match="max_sequence_length: got 513, expected 1 to 512"):
        load("flux", max_sequence_length=513)
    with pytest.raises(ValueError, match="guidance_embedding: got 3.5, but StableDiff.* takes"):
        load("sd3", guidance_embedding=3.5)
    with pytest.raises(ValueError, match="num_frames: got 5, but FluxPipeline takes height"):
        load("flux", num_frames=5)
    with pytest.raises(ValueError, match=r"num_frames: got 5, expected 8 k \+ 1, as 1, 9, 17"):
        load("ltx", num_frames=5)
    with pytest.raises(ValueError, match="frame_rate: got 0, expected frames per second above 0"):
        load("ltx", frame_rate=0)
    klein = tiny.pipeline("klein")
    klein.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match="negative_prompt: got 'bad', but this model takes no gui"):
        Flux2Klein(klein, negative_prompt="bad")
    assert load("flux", negative_prompt="bad").guidance.negative_prompt == "bad"
    assert len(Conditioning.cat([load("flux").encode(PROMPTS)] * 2)) == 4


def test_a_processor_is_compared_by_its_tokenizer():
    """FLUX.2 dev has one, whose own class needs torchvision."""
    (tokenizer, encoder), (longer, _) = tiny_text.qwen3(1), tiny_text.qwen3(1)
    check_vocabulary("tokenizer", SimpleNamespace(tokenizer=tokenizer), encoder)
    longer.add_tokens(["more"])
    with pytest.raises(ValueError, match="path: tokenizer has .* words and its encoder"):
        check_vocabulary("tokenizer", SimpleNamespace(tokenizer=longer), encoder)


@pytest.mark.parametrize("name", ["flux2", "klein", "z_image"])
@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template that serves"),
        ("{% if x %}", "no chat template that serves: .*endif"),
        ("hello", "leaves the prompt out: 'hello'"),
    ],
)
def test_a_template_without_the_prompt_is_refused(name, template, message, directories, tmp_path):
    """Every prompt's row would be the same."""
    directory = shutil.copytree(directories(name), tmp_path / "model")
    file = directory / "tokenizer/chat_template.jinja"
    file.unlink()
    if template is not None:
        file.write_text(template)
    with pytest.raises(ValueError, match="^path: .*" + message):
        load_model(directory, text_encoders=False).encode(["a red cat"])
