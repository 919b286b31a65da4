"""Weights of which processes have parts: they train as one process does, and leave its files."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from safetensors.torch import load_file

from flowkern.train.config import ConfigError, to_dict
from flowkern.train.errors import RunError
from flowkern.train.loop import Loop
from flowkern.train.sharding import require

HERE = Path(__file__).parent
KINDS = {"lora": (), "full": ("lora=null",)}
QUANTIZED = {kind: (f"model.quantization={kind}",) for kind in ("int8", "nf4")}
FILES = {"full": "transformer/diffusion_pytorch_model"}
SMALL = ("algorithm.kl_coef=0.1", "algorithm.num_inference_steps=2", "train.max_batch=4",
         "train.learning_rate=1e-3", "train.ema_decay=0.5", "train.steps=2")  # fmt: skip
EVERY_CELL = pytest.mark.skipif(
    os.environ.get("FLOWKERN_EVERY_CELL") != "1", reason="FLOWKERN_EVERY_CELL=1: half a minute"
)


def weights_of(loop):
    return {n: p.detach().clone() for n, p in loop.task.model.network.named_parameters()}


def off(one, other):
    """The largest difference."""
    assert one.keys() == other.keys()
    return max((other[name] - value).abs().max() for name, value in one.items())


@pytest.mark.long(20)
def test_two_processes_train_what_one_does_and_leave_its_files(tiny, tmp_path, on_processes):
    """And all that the program's functions are called after."""
    trees = {
        kind: to_dict(tiny(*SMALL, *more, "train.sharding=fsdp2")) for kind, more in KINDS.items()
    }
    on_processes(2, HERE / "split_program.py", tmp_path, json.dumps(trees))
    for kind, more in KINDS.items():
        one, found = Loop(tiny(*SMALL, *more)), load_file(tmp_path / kind / "two_steps")
        before = weights_of(one)
        one.step(), one.step()
        assert off(weights_of(one), found) <= 5e-6 and off(before, found) > 1e-3
    back = Loop(tiny(*SMALL, *KINDS["full"]))
    back.load(tmp_path / "full/checkpoint")
    back.step()
    assert off(weights_of(back), found) <= 1e-6


@EVERY_CELL
@pytest.mark.parametrize("kind", [*KINDS, *QUANTIZED])
def test_runs_are_those_of_one_process(tiny, tmp_path, lines, train_on, on_processes, kind):
    """With validations (of three prompts) and checkpoints after every step, a running mean, and two
    updates of a rollout: on two processes, by nodes of two on four, and resumed on other numbers.
    """

    if kind == "nf4":
        pytest.importorskip("bitsandbytes")

    def config(name, *more, origin=None):
        options = [
            "train.steps=4",
            "train.checkpointing_steps=2",
            "algorithm.updates_per_rollout=2",
        ]
        options += ["validation.steps=2", "validation.num_prompts=3"]
        options += ["algorithm.prompts_per_rollout=8"]
        if origin:
            options.append(f"train.resume_from_checkpoint={tmp_path / origin / 'checkpoint-2'}")
        return tiny(*SMALL, *(KINDS | QUANTIZED)[kind], *options, *more, name=name)

    split, whole = "train.sharding=fsdp2", "train.rollout_unshard=true"
    Loop(config("one")).run()
    train_on(
        2, config("ddp"), config("two", split), config("two_two", split, whole, origin="two"),
    )  # fmt: skip
    program = tmp_path / "nodes.py"
    program.write_text(
        "import os\nos.environ['LOCAL_WORLD_SIZE'] = '2'\n" + (tmp_path / "runs.py").read_text()
    )
    hsdp = [
        config("four", "train.sharding=hsdp"),
        config("two_four", "train.sharding=hsdp", whole, origin="two"),
    ]
    on_processes(4, program, json.dumps([to_dict(one) for one in hsdp]))
    Loop(config("two_one", origin="two")).run()

    def saved(name):
        folders = (tmp_path / name / "checkpoint-4" / folder for folder in ("", "ema"))
        file = FILES.get(kind, "adapter_model")
        return [load_file(f"{folder / file}.safetensors") for folder in folders]

    straight = saved("two")
    for name in ("one", "ddp", "two_two", "two_one", "four", "two_four"):
        most = {"two_two": 0, "two_one": 1e-6}.get(name, 5e-6)
        for expected, found in zip(straight, saved(name), strict=True):
            assert off(expected, found) <= most, name
        for file in ("metrics.jsonl", "validation.jsonl"):
            records = lines(tmp_path / name / file)
            others = lines(tmp_path / "two" / file)[-len(records) :]
            for record, other in zip(records, others, strict=True):
                assert record == pytest.approx(other, rel=1e-3, abs=1e-6), (name, file)


@pytest.mark.parametrize(
    "option, message",
    [
        ("train.max_batch=8", "got fsdp2 on one process; expected several"),
        ("train.sharding=hsdp", r"got hsdp, .* are 4 with 4 on this node .*; expected fsdp2"),
        ("model.quantization=float8", "got fsdp2, but model.quantization is float8, whose weights"),
        (
            "train.optimizer=adamw_8bit",
            "got fsdp2, but train.optimizer is adamw_8bit and lora null",
        ),
        (
            "train.mixed_precision=fp16",
            "got fsdp2, but train.mixed_precision is fp16 and lora null",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(tiny, option, message):
    config = tiny("lora=null", "train.sharding=fsdp2", option)
    world = 1 if "one process" in message else 4
    with pytest.raises(ConfigError, match=f"^train.sharding: {message}"):
        require(config, SimpleNamespace(num_processes=world))


def test_after_an_exception_no_checkpoint_is_made_of_parts(tiny, monkeypatch):
    """The other processes may be elsewhere: nothing is asked of them."""
    loop = Loop(tiny("train.steps=3", "data.test_prompts=null"))
    loop.processes.saves_alone, collect = False, loop.task.collect

    def fails(iteration):
        return collect(iteration) if iteration == 0 else 1 / 0

    monkeypatch.setattr(loop.task, "collect", fails)
    with pytest.raises(RunError, match="step 2: .*; no checkpoint is there, .* has a part of it"):
        loop.run()
    assert not list(Path(loop.config.output_dir).glob("checkpoint-*"))


def test_a_plugin_of_accelerates_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ConfigError, match="^train.sharding: got null, and accelerate's .* for FSDP"
    ):
        require(tiny(), SimpleNamespace(num_processes=2))


def test_an_option_of_split_weights_is_refused_without_them(tiny):
    with pytest.raises(ConfigError, match="^train.rollout_unshard: got true, which .*null ignores"):
        tiny("train.rollout_unshard=true")
    with pytest.raises(ConfigError, match="^train.sharding: got fsdp2 on one process"):
        Loop(tiny("train.sharding=fsdp2"))
