"""model.attention_backend: all attention goes through it, or a refusal says why."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import JointAttnProcessor2_0
from loaded_once import FROZEN
from tiny import PIPELINES

from flowkern.checks import ConfigError
from flowkern.models import attention_backend as backends
from flowkern.models import compiled
from flowkern.train.config import from_dict
from flowkern.train.loop import Loop

PROMPTS = ["a red cat", "an old photo of the small blue dog on a seven"]
FRAMES = {"wan": 5, "wan_a14b": 5, "wan_ti2v": 5, "ltx": 9, "hunyuan_video": 5}
FEW = ("sd3", "flux", "qwen_image", "wan", "hunyuan_video")
EVERY = os.environ.get("FLOWKERN_EVERY_CELL") == "1"
MASKED = {"qwen_image", "z_image", "chroma", "ltx", "hunyuan_video"}


@pytest.fixture
def load(directories, loaded):
    def model(name):
        frames = {"num_frames": FRAMES[name]} if name in FRAMES else {}
        return loaded(directories(name), height=32, width=64, **frames)

    return model


@pytest.fixture
def asked():
    """asked(model) -> (2, *D); of A14B, a row of each network."""

    @torch.no_grad()
    def of(model):
        x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        return model.velocity(x_t, torch.tensor([0.95, 0.3]), model.encode(PROMPTS))

    return of


@pytest.fixture
def calls(monkeypatch):
    """Of a stand-in of flash-attn, as if that were installed: has each a mask?"""
    seen, ask = [], F.scaled_dot_product_attention

    def flash(query, key, value, attn_mask=None):
        seen.append(attn_mask is not None)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return ask(*heads_first, attn_mask=attn_mask).transpose(1, 2)

    name, registry = AttentionBackendName.FLASH, _AttentionBackendRegistry
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setitem(registry._backends, name, flash)
    taken = {"query", "key", "value", "attn_mask"}
    monkeypatch.setitem(registry._supported_arg_names, name, taken)
    return seen


def by_itself(*_, **__):
    raise AssertionError("asks torch by itself")


@pytest.mark.parametrize("name", PIPELINES if EVERY else FEW)
def test_all_attention_of_a_network_goes_through_it(name, load, asked, calls, monkeypatch):
    model = load(name)
    right, default = asked(model), _AttentionBackendRegistry.get_active_backend()
    count = model.set_attention_backend("flash")
    assert _AttentionBackendRegistry.get_active_backend() == default
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_itself)
    found = asked(model)
    assert len(calls) == count > 0 and any(calls) == (name in MASKED)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6 * right.abs().max().item())


@pytest.mark.parametrize("name", ["_native_math", "flex"])
def test_sd3_says_what_its_own_processor_says(name, load, asked):
    """Its two kinds of attention, of which the second is of the image alone."""
    model = load("sd3")
    right = asked(model)
    assert model.set_attention_backend(name) == 3
    torch.testing.assert_close(asked(model), right, rtol=0, atol=1e-6)


def test_a_processor_that_asks_torch_by_itself_is_refused(load):
    model = load("flux")
    _, module = backends.modules(model.network)[1]
    module.set_processor(JointAttnProcessor2_0())
    with pytest.raises(ValueError, match="but single_.*attn of Flux.* has a JointAttn.* itself$"):
        model.set_attention_backend("native")


def named(function):
    """Passes a mask over."""
    return lambda query, key, value, attn_mask: function(query, key, value)


def test_values_and_gradients_are_tried(calls, monkeypatch):
    cpu = torch.device("cpu")
    backends.try_backend("flash", cpu, torch.bfloat16, is_trained=True)
    kept, name = _AttentionBackendRegistry._backends, AttentionBackendName.FLASH
    flash = kept[name]
    for wrong, message in (
        (lambda q, k, v: flash(q, k, v).detach(), "in float32: .* not require grad"),
        (lambda q, k, v: flash(q, k, v * 1.2), "whose answer is off by 0.2$"),
        (lambda q, k, v: flash(q, k.detach(), v), "in float32: .* not .*used"),
        (lambda q, k, v: flash(q, k.detach() + 0 * k, v), "whose gradient of k is off by 1$"),
        (flash, "whose answer under a mask is off by 0"),
    ):
        monkeypatch.setitem(kept, name, named(wrong))
        with pytest.raises(ValueError, match=f"^attention_backend: got 'flash', .*{message}"):
            backends.try_backend("flash", cpu, torch.float32, is_trained=True)


@pytest.fixture
def loop_of(directories, loaded, tmp_path, monkeypatch):
    """loop_of(family, model={...}, ...)"""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "prompts.txt").write_text("a red cat\nan old photo of the small blue dog")

    def of(family, **model):
        size = {"height": 32, "width": 32}
        own = {"name": "flow_grpo", "num_inference_steps": 3, "guidance_scale": 2.0}
        own |= {"group_size": 3, "prompts_per_rollout": 2, "updates_per_rollout": 1}
        config = {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path), **model},
            "data": {"train_prompts": str(tmp_path / "prompts.txt")},
            "reward": {f"{__name__}:brightness": {}},
            "lora": {"rank": 2, "alpha": 4},
            "train": {"steps": 4, "max_batch": 4, "learning_rate": 1e-2},
            "algorithm": own | {"kl_coef": 0.01},
        }
        frames = {"num_frames": FRAMES[family]} if family in FRAMES else {}
        torch.manual_seed(0)
        return Loop(from_dict(config), loaded(directories(family), FROZEN, **size, **frames))

    return of


def brightness(images, prompts, metadata):
    return 1e6 * images.double().flatten(1).mean(1)


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_a_run_learns_through_it(family, loop_of):
    found = []
    for name in (None, "native"):
        loop = loop_of(family, attention_backend=name)
        loop.task.begin(0)
        (first,), (second,) = loop.step(), loop.step()
        assert first["ratio_mean"] == 1 and first["kl"] == 0 < second["kl"]
        found.append([second[key] for key in ("kl", "grad_norm", "reward/mean")])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert [fact for fact in loop.task.facts if fact.startswith("attention through native, ")]


def test_compiled_blocks_go_through_it(loop_of, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    loop = loop_of("sd3", attention_backend="native", compile=True, gradient_checkpointing=True)
    loop.task.begin(0)
    (first,) = loop.step()
    assert first["ratio_mean"] == 1 and first["grad_norm"] > 0
    assert " 2 graphs, " in loop.task.facts[-1]


@pytest.mark.parametrize(
    "family, name, message",
    [
        ("sd3", "flush", "expected one of _flash_3, .* xformers$"),
        ("sd3", "flash", r"flash-attn>=.*; installed here: .*, flex, native$"),
        ("sd3", "_flash_3_hub", "`kernels`.*; installed here: "),
        ("sd3", "xformers", "install `xformers>=.*; installed here: "),
        ("sd3", "sage", "no gradient: .* `flowkern sample --attention-backend sage`; expected"),
        ("sd3", "_native_cudnn", "but on cpu, in float32: No viable backend"),
        ("sd3", "flex", "but on cpu, in float32: FlexAttention does not support backward on CPU"),
        ("qwen_image", "_native_flash", "`attn_mask` is not supported for native flash attention$"),
    ],
)
def test_what_cannot_be_had_is_refused(family, name, message, loop_of):
    with pytest.raises(ConfigError, match=f"^model.attention_backend: got '{name}', .*{message}"):
        loop_of(family, attention_backend=name).task.begin(0)


def test_weights_that_are_no_numbers_are_not_said_to_be_the_backends(loop_of):
    loop = loop_of("sd3", attention_backend="native")
    with torch.no_grad():
        next(iter(loop.task.model.network.parameters())).fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"velocity is not finite; .*\(model.path\)"):
        loop.task.begin(0)


def test_nothing_is_asked_of_another_network(load, asked):
    """Qwen-Image's processors follow the default of the process, which another's choice leaves."""
    other = load("qwen_image")
    right = asked(other)
    load("flux").set_attention_backend("flex")
    assert torch.equal(asked(other), right)
    assert _AttentionBackendRegistry.get_active_backend()[0] == "native"
