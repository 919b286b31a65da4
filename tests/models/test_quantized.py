"""A frozen base in 8 or 4 bits: what samples is what learns, in less memory."""

import copy
import math
import os
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from loaded_once import FROZEN
from safetensors.torch import load_file
from test_every_algorithm import COMMON, PROMPTS, SIZES, SMALL

from flowkern.checks import ConfigError
from flowkern.models import compiled
from flowkern.models.quantize import count, frozen_bytes, quantize
from flowkern.models.small_weights import SmallLinear
from flowkern.rl.algorithms import names
from flowkern.train.blocks import asking
from flowkern.train.config import from_dict
from flowkern.train.doctor import examine
from flowkern.train.loading import load_pipeline
from flowkern.train.loop import Loop

EVERY = os.environ.get("FLOWKERN_EVERY_CELL") == "1"
KINDS = ["int8", "nf4"]
LATEST = {"resume_from_checkpoint": "latest"}
OFF = {"int8": 0.01, "nf4": 0.11}
"""How far a weight of normal numbers may be off, by norms. int8: steps of 1/127 of a row's largest,
up to 4 deviations, are .29 steps off; nf4: measured at .088 to .097."""


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return request.param


def brightness(images, prompts, metadata):
    return 1e6 * images.double().flatten(1).mean(1)


@pytest.fixture
def loop_of(directories, loaded, tmp_path, monkeypatch):
    """loop_of(family, model={...}, train={...}, lora={...}, dtype, run, the algorithm's ...)"""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def of(family, model=(), train=(), lora=(), dtype=torch.bfloat16, run="run", **own):
        name = own.setdefault("name", "flow_grpo")
        config = {
            "output_dir": str(tmp_path / run),
            "model": {"path": str(tmp_path), **dict(model)},
            "data": {"train_prompts": str(tmp_path / "prompts.txt")},
            "reward": {f"{__name__}:brightness": {}},
            "lora": None if lora is None else {"rank": 2, "alpha": 4, **dict(lora)},
            "train": {"steps": 4, "max_batch": 8, "learning_rate": 1e-3, **dict(train)},
            "algorithm": COMMON | SMALL[name] | own,
        }
        torch.manual_seed(0)
        return Loop(
            from_dict(config), loaded(directories(family), FROZEN, dtype=dtype, **SIZES[family])
        )

    return of


def whole(layer):
    """The weight of a small layer, by what it answers."""
    return layer(torch.eye(layer.in_features, dtype=layer.dtype)).float().t().contiguous().detach()


# ---- a layer ----


@pytest.mark.parametrize("sizes", [(512, 96), (33, 7), (7, 33), (50, 66), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_layer_is_the_linear_one_of_its_weight(kind, sizes, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=sizes[0] != 33).to(dtype).requires_grad_(False)
    nn.init.normal_(layer.weight)
    small = SmallLinear(layer, kind)
    given = torch.randn(2, 3, sizes[0], dtype=dtype)
    right = copy.deepcopy(layer)
    no_bias = SmallLinear(nn.Linear(*sizes, bias=False).to(dtype), kind)
    no_bias.small, no_bias.scale = small.small, small.scale
    right.weight.data = whole(no_bias).to(dtype)
    off = (right.weight - layer.weight).float().norm() / layer.weight.float().norm()
    assert off <= OFF[kind] and (off > 0 or sizes == (1, 1))
    found = []
    for one in (right, small):
        x = given.clone().requires_grad_(True)
        out = one(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        with torch.no_grad():
            assert torch.equal(one(given), out)
        found.append((out, gradient))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def saved_by(call, *given):
    """Bytes that are kept for a backward pass, and what came out."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(*given)
    return sum(kept.values()), out


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_nothing_of_a_whole_weight_is_kept_for_the_way_back(kind, backend):
    """Nor by a compiler, which otherwise makes it once for both ways."""
    torch._dynamo.reset()
    layers = [nn.Linear(64, 64).bfloat16().requires_grad_(False) for _ in range(2)]
    network = nn.Sequential(*(SmallLinear(layer, kind) for layer in layers))
    call = network if backend is None else torch.compile(network, fullgraph=True, backend=backend)
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    kept, out = saved_by(call, x)
    least = sum(p.nbytes for layer in network for p in (layer.small, layer.scale))
    assert kept == least < 0.6 * sum(layer.weight.nbytes for layer in layers)
    assert torch.equal(out, network(x))
    found = [torch.autograd.grad(y.sum(), x)[0] for y in (out, network(x))]
    assert torch.equal(*found)


def test_large_and_equal_weights_stay_finite(kind):
    layer = nn.Linear(64, 4, bias=False).requires_grad_(False)
    layer.weight[0], layer.weight[1], layer.weight[2] = 0, 1e37, 1e-37
    small = whole(SmallLinear(layer, kind))
    assert not small[0].any()
    torch.testing.assert_close(small[1:3], layer.weight[1:3])


def test_under_autocast_it_computes_as_a_linear_layer_does(kind):
    layer = nn.Linear(32, 8).requires_grad_(False)
    small, x = SmallLinear(layer, kind), torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = small(x)
        assert out.dtype == layer(x).dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.float32


# ---- a network ----


class Block(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.wide, self.norm1 = nn.Linear(8, 33, dtype=dtype), nn.ModuleDict()
        self.norm1["linear"] = nn.Linear(8, 8, dtype=dtype)
        self.narrow = nn.Linear(33, 8, bias=False, dtype=dtype)
        self.learns = nn.Linear(8, 8, dtype=dtype)
        self.requires_grad_(False)
        self.learns.requires_grad_(True)


def test_frozen_layers_are_quantized_and_counted_as_they_were():
    """Norms' own, too, which are a third of Stable Diffusion 3.5 medium."""
    block = Block()
    before, right = frozen_bytes(block), sum(p.numel() for p in block.parameters())
    assert quantize([block], "int8") == 3
    kinds = {name: type(module) for name, module in block.named_modules()}
    assert kinds["wide"] is kinds["narrow"] is kinds["norm1.linear"] is SmallLinear
    assert kinds["learns"] is nn.Linear
    assert count(block) == right
    assert before - frozen_bytes(block) == 2 * 33 * 8 + 8 * 8 - 4 * (33 + 8 + 8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused_by_name(kind, value):
    block = Block()
    block.narrow.weight[3, 4] = value
    with pytest.raises(ValueError, match="^narrow: weights are not finite$"):
        quantize([block], kind)


def test_another_dtype_and_nothing_frozen_are_refused():
    with pytest.raises(ValueError, match="wide is in float64, expected float32 or float16 or bf"):
        quantize([Block(torch.float64)], "int8")
    with pytest.raises(ValueError, match="no frozen linear layer is there"):
        quantize([Block().requires_grad_(True)], "int8")


# ---- a run ----


def test_an_algorithm_begins_on_policy(kind, loop_of):
    """Ratios, with one half of guidance that learns and with both, and points of images."""
    for name in names() if EVERY else ["mixgrpo", "awm"]:
        loop = loop_of("sd3", {"quantization": kind}, name=name)
        loop.task.begin(0)
        first, *_ = loop.step()
        assert first["ratio_mean"] == 1 and 0 < first["grad_norm"] < math.inf, name


@pytest.mark.parametrize("family", SIZES if EVERY else ["wan_a14b"])
def test_a_family_is_near_what_it_was_and_says_the_same_with_a_gradient(kind, family, loop_of):
    velocities = []
    for quantization in (None, kind):
        loop = loop_of(family, {"quantization": quantization})
        loop.task.begin(0)  # it is asked with a gradient and without
        with torch.no_grad():
            velocities.append(asking(loop.task.model, 4, loop.task.device)().float())
    right, found = velocities
    off = ((found - right).norm() / right.norm()).item()
    print(f"{family}, {kind}: {off:.4f}; {loop.task.facts[-1]}")
    assert 0 < off < {"int8": 0.1, "nf4": 0.5}[kind]


def test_a_run_with_all_that_reads_the_network(kind, loop_of):
    """A backward pass that computes blocks again, a KL whose reference leaves the adapter out, an
    average of the weights; an adapter that is wider than the network."""
    own = {"kl_coef": 0.01, "updates_per_rollout": 1, "uncond_gradient": True}
    model = {"quantization": kind, "gradient_checkpointing": True}
    loop = loop_of("sd3", model, {"ema_decay": 0.9, "learning_rate": 1e-2}, {"rank": 40}, **own)
    loop.task.begin(0)
    (first,), (second,) = loop.step(), loop.step()
    assert first["ratio_mean"] == second["ratio_mean"] == 1
    assert first["kl"] == 0 < second["kl"]
    said = [fact for fact in loop.task.facts if f"frozen layers in {kind}: what is frozen" in fact]
    assert len(said) == 1


@pytest.mark.skipif(not EVERY, reason="FLOWKERN_EVERY_CELL=1: seconds; a float8 base is compiled")
def test_compiled_it_says_the_same_with_a_gradient(kind, loop_of, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    model, lora = {"quantization": kind, "compile": True}, {"target_modules": ["to_q"]}
    loop = loop_of("sd3", model, {"max_batch": 2}, lora)
    loop.task.begin(0)  # refused otherwise
    assert loop.task.model.compiled.graphs == 2


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, loop_of, tmp_path):
    """The base is quantized again, to the same."""
    saved = []
    train, own = {"learning_rate": 1e-2, "steps": 2}, {"updates_per_rollout": 1}
    for run, parts in (("straight", [{}]), ("resumed", [{"steps": 1}, LATEST])):
        for part in parts:
            loop_of("sd3", {"quantization": kind}, train | part, run=run, **own).run()
        saved.append(load_file(tmp_path / run / "checkpoint-2/adapter_model.safetensors"))
    straight, resumed = saved
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(weight, resumed[name]) for name, weight in straight.items())


def test_the_doctor_finds_it_sound_and_counts_the_weights(kind, loop_of):
    plain = loop_of("sd3").task.model.describe()["parameters"]
    report = examine(loop_of("sd3", {"quantization": kind}, dtype=torch.float32))
    assert report.is_sound and report.facts["parameters"] == plain


def test_what_it_learned_is_an_adapter_of_the_whole_network(kind, loop_of, tmp_path):
    loop = loop_of("sd3", {"quantization": kind}, {"learning_rate": 1e-2})
    loop.task.begin(0)
    loop.step()
    loop.task.model.save_lora(tmp_path / "lora")
    plain = loop_of("sd3")
    plain.task.model.load_lora(tmp_path / "lora")
    learned = {n: p for n, p in loop.task.model.network.named_parameters() if p.requires_grad}
    for name, weight in plain.task.model.network.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight, learned.pop(name))
    assert not learned
    pipeline = plain.task.model.kind.from_pretrained(plain.task.model.directory)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert pipeline.get_active_adapters()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora": None, "dtype": torch.float32}, "int8, but lora is null: no weight is frozen$"),
        (
            {"dtype": torch.float64},
            "int8, but norm1.linear is in float64, expected float32 or float16",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(options, message, loop_of):
    with pytest.raises(ConfigError, match=f"^model.quantization: got {message}"):
        loop_of("sd3", {"quantization": "int8"}, **options)


def test_nf4_says_what_it_takes(loop_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"quantization: got nf4, which takes bitsandbytes: pip install 'flowkern\[quantiza"
    with pytest.raises(ConfigError, match=message):
        loop_of("sd3", {"quantization": "nf4"})


def test_a_network_that_is_to_be_quantized_stays_on_the_host(directories, loop_of):
    """A device may not hold all of it before: what is not the network goes there, to one of no
    memory here."""
    config = loop_of("sd3", {"quantization": "int8"}).config
    path = {"path": str(directories("sd3"))}
    for quantization, where in (("int8", "cpu"), (None, "meta")):
        options = config.model.model_copy(update=path | {"quantization": quantization})
        model = load_pipeline(config.model_copy(update={"model": options}), "meta")
        assert {p.device.type for p in model.network.parameters()} == {where}
        assert {p.device.type for p in model.pipeline.vae.parameters()} == {"meta"}
