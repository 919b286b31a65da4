"""Blocks that are compiled or quantized: one graph for sampling and training, or a refusal."""

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from loaded_once import FROZEN

from flowkern.checks import ConfigError
from flowkern.models import compiled, quantize
from flowkern.models.compiled import Compiled, repeated
from flowkern.train.config import from_dict
from flowkern.train.loop import Loop

WIDTH, ROWS = 16, 4


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, WIDTH) / 4)
        self.up = nn.Parameter(torch.randn(WIDTH, 2) / 4)

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


class Block(nn.Module):
    """Of two streams; the last has one answer."""

    def __init__(self, is_last):
        super().__init__()
        self.layer, self.is_last = Adapted(), is_last

    def forward(self, x, text, shift):
        both = torch.cat([x + shift[:, None, None], text], dim=1)
        x, text = (both + self.layer(both).tanh()).split([x.shape[1], text.shape[1]], dim=1)
        return (None if self.is_last else text), x


class Network(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(i == 3) for i in range(4))

    def forward(self, x, sigma, parts):
        text = parts["text"]
        for block in self.blocks:
            text, x = block(x, text=text, shift=sigma)
        return x


@pytest.fixture(autouse=True)
def no_code(monkeypatch):
    """What is traced is run as it is: code takes a CPU a minute."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


def inputs(rows=ROWS):
    torch.manual_seed(1)
    given = torch.randn(ROWS, 3, WIDTH), torch.rand(ROWS), torch.randn(ROWS, 2, WIDTH)
    x, sigma, text = (each[:rows] for each in given)
    return x, sigma, {"text": text}


@torch._dynamo.config.patch(recompile_limit=8)  # torch's own
def test_sampling_and_learning_run_one_graph(network):
    right, names = network(*inputs()), list(network.state_dict())
    blocks = Compiled(repeated(network), ROWS)
    assert list(network.state_dict()) == names
    assert torch._dynamo.config.recompile_limit == compiled.RECOMPILES
    with torch.no_grad():
        sampled = blocks.ask(network, *inputs())
    # Nothing that asks for a gradient enters the first, and the last is another.
    assert blocks.graphs == 3 and not sampled.requires_grad
    learned = blocks.ask(network, *inputs())
    learned.sum().backward()
    assert blocks.graphs == 3
    assert torch.equal(sampled, learned) and torch.equal(learned, right)
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    with torch.no_grad():  # otherwise each sort has a graph of its own
        network(*inputs())
    assert blocks.graphs == 6


def test_fewer_rows_are_filled_up_and_more_refused(network):
    blocks = Compiled(repeated(network), ROWS)
    whole, given = blocks.ask(network, *inputs()), inputs(3)
    given[0].requires_grad_(True)
    few = blocks.ask(network, *given)
    assert (
        torch.equal(few, whole[:3]) and blocks.graphs == 4
    )  # what enters the first has a gradient
    (found,) = torch.autograd.grad(few.sum(), given[0])
    x = inputs()[0].requires_grad_(True)
    (right,) = torch.autograd.grad(network(x, *inputs()[1:])[:3].sum(), x)
    torch.testing.assert_close(found, right[:3])
    blocks.rows = 3
    with pytest.raises(ValueError, match="x_t: got 4 rows, expected at most 3"):
        blocks.ask(network, *inputs())


@pytest.fixture
def loop_of(directories, loaded, tmp_path, monkeypatch):
    """loop_of(family, dtype, model={...}, ...)"""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "prompts.txt").write_text("a red cat\nan old photo of the small blue dog")

    def of(family, dtype=torch.bfloat16, model=(), lora=(), **size):
        own = {"name": "flow_grpo", "num_inference_steps": 3, "guidance_scale": 2.0}
        own |= {
            "group_size": 3,
            "prompts_per_rollout": 2,
            "updates_per_rollout": 1,
            "kl_coef": 0.01,
        }
        config = {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path), **dict(model)},
            "data": {"train_prompts": str(tmp_path / "prompts.txt")},
            "reward": {f"{__name__}:brightness": {}},
            "lora": None if lora is None else {"rank": 2, "alpha": 4},
            "train": {"steps": 4, "max_batch": 4, "learning_rate": 1e-2},
            "algorithm": own,
        }
        torch.manual_seed(0)
        size = {"height": 32, "width": 32} | size
        return Loop(from_dict(config), loaded(directories(family), FROZEN, dtype=dtype, **size))

    return of


def brightness(images, prompts, metadata):
    return 1e6 * images.double().flatten(1).mean(1)


def test_a_run_is_what_it_is_without(loop_of):
    """The reference of its KL is a copy then, for which nothing is compiled; a backward pass that
    computes blocks again computes the same ones."""
    model = {"gradient_checkpointing": True}
    found = []
    for is_compiled in (False, True):
        loop = loop_of("sd3", torch.float32, model | {"compile": is_compiled})
        loop.task.begin(0)
        (first,), (second,) = loop.step(), loop.step()
        assert first["ratio_mean"] == 1 and first["kl"] == 0 < second["kl"]
        found.append(
            {
                k: v
                for k, v in second.items()
                if not k.startswith(("timing", "memory", "throughput"))
            }
        )
    right, ours = found
    assert ours == pytest.approx(right, rel=1e-4)
    blocks = loop.task.model.compiled
    said = f"compiled {len(blocks.blocks)} blocks, {blocks.graphs} graphs, for 4 rows in "
    assert len(blocks.blocks) == blocks.graphs == 2
    assert [fact.startswith(said) for fact in loop.task.facts] == [False, True]


def test_a_network_that_says_otherwise_with_a_gradient_is_refused(loop_of, monkeypatch):
    loop = loop_of("sd3", model={"compile": True})
    call = loop.task.model.call

    def differs(*given):
        asks = loop.task.model.compiled._is_cut
        return call(*given) * (1 + 2**-7 * asks)

    monkeypatch.setattr(loop.task.model, "call", differs)
    with pytest.raises(ConfigError, match="model.compile: .* otherwise with a gradient .* 1$"):
        loop.task.begin(0)


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("sd3", {"model": {"quantization": "float8"}}, "float8, but cpu multiplies no float8; exp"),
        ("sd3", {"model": {"quantization": "float8"}, "lora": None}, "but lora is null: no weight"),
        (
            "wan_a14b",
            {"model": {"compile": True}, "num_frames": 5},
            "there are two networks",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(family, options, message, loop_of):
    key = "model." + next(iter(options["model"]))
    dtype = torch.float32 if "lora" in options else torch.bfloat16
    with pytest.raises(ConfigError, match=f"^{key}: got .*{message}"):
        loop_of(family, dtype, **options)


def test_a_network_whose_blocks_are_not_known_is_refused():
    with pytest.raises(ValueError, match="Sequential does not say which of its blocks repeat"):
        repeated(nn.Sequential(nn.Linear(2, 2)))


def test_a_float8_base_learns(loop_of, monkeypatch):
    """Its products by a CPU's other ones; rows do not see each other."""
    monkeypatch.setattr(quantize, "has_products", lambda device: True)
    monkeypatch.setattr(quantize, "UNIT", 8)
    model = {"quantization": "float8", "compile": True}
    with pytest.raises(ConfigError, match=r"model.quantization: .* in float32, expected bfloat16"):
        loop_of("sd3", torch.float32, model)
    loop = loop_of("sd3", torch.bfloat16, model)
    loop.task.begin(0)
    (record,) = loop.step()
    assert record["ratio_mean"] == 1 and record["grad_norm"] > 0
    assert "frozen layers in float8: what is frozen of the network takes " in loop.task.facts[1]
