"""Where a run can stop, and that it goes on from there as if it never had."""

import dataclasses
import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from safetensors.torch import load_file

from flowkern.train import checkpoint
from flowkern.train.config import ConfigError
from flowkern.train.errors import RunError
from flowkern.train.flow import FlowTask
from flowkern.train.loop import Loop
from flowkern.train.stop import Stop, StopRequest

LATEST = "train.resume_from_checkpoint=latest"


@pytest.fixture(autouse=True)
def hangup():
    """SIGHUP ends a process, also where the tests were started by nohup, which a run respects."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def wrapped(function, condition, before):
    """`function`, with `before` called first, once, when `condition` holds."""
    left = [before]

    def call(*arguments, **options):
        if left and condition():
            left.pop()()
        return function(*arguments, **options)

    return call


def put(loop, name, reward):
    loop.task.rewards[name] = dataclasses.replace(loop.task.rewards[name], reward=reward)


def ask(number):
    return lambda: os.kill(os.getpid(), number)


def in_rollout(loop):
    model = loop.task.model
    model.velocity = wrapped(model.velocity, lambda: loop.iteration == 1, ask(signal.SIGINT))


def in_reward(loop):
    def hang():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(600)

    name, reward = next(iter(loop.task.rewards.items()))
    put(loop, name, wrapped(reward, lambda: loop.iteration == 1, hang))


def in_second_update(loop):
    task = loop.task
    task.loss = wrapped(task.loss, lambda: loop.global_step == 3, ask(signal.SIGTERM))


def in_validation(loop):
    sample = loop.task.validation._sample
    loop.task.validation._sample = wrapped(
        sample, lambda: loop.global_step == 2, ask(signal.SIGTERM)
    )


def in_last_update(loop):
    loop.update = wrapped(loop.update, lambda: loop.global_step == 3, ask(signal.SIGHUP))


def assert_same_end(one: Path, two: Path, lines):
    for name in ("metrics.jsonl", "validation.jsonl"):
        expected = lines(one / name)
        assert lines(two / name) == expected and len(expected) >= 2
    for name in ("adapter_model.safetensors", "ema/adapter_model.safetensors"):
        expected, found = (load_file(path / "checkpoint-4" / name) for path in (one, two))
        assert expected.keys() == found.keys() and len(expected) > 0
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    states = [torch.load(p / "checkpoint-4/state.pt", weights_only=True) for p in (one, two)]
    for key in ("step", "iteration", "updates_done"):
        assert states[0][key] == states[1][key]
    for key, moments in states[0]["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, states[1]["optimizer"]["state"][key][name])


@pytest.mark.long(30)
def test_a_run_stopped_anywhere_and_resumed_is_the_one_that_never_stopped(tiny, lines, capsys):
    options = (
        "algorithm.updates_per_rollout=2", "train.lr_scheduler=linear", "train.ema_decay=0.9",
        "train.learning_rate=2e-2", "train.checkpointing_steps=100", "train.max_batch=8",
        "validation.steps=2",
    )  # fmt: skip
    straight = tiny(*options, name="straight")
    assert Loop(straight).run() == 0
    for stop, status, step in (
        (in_rollout, 130, 2),
        (in_reward, 129, 2),
        (in_second_update, 143, 3),
        (in_validation, 143, 2),
        (in_last_update, 129, 4),
    ):
        name = stop.__name__
        loop = Loop(tiny(*options, name=name))
        stop(loop)
        assert loop.run() == status, name
        directory = Path(loop.config.output_dir)
        said = f"stopped after step {step} by {signal.Signals(status - 128).name}; continue with"
        assert said in capsys.readouterr().err
        assert [p.name for p in checkpoint.checkpoints(directory)] == [f"checkpoint-{step}"]
        assert [record["step"] for record in lines(directory / "metrics.jsonl")] == [
            *range(1, step + 1)
        ]
        assert not (directory / "run.lock").exists()
        if stop is in_reward:
            continue  # the state is that of in_rollout
        torch.manual_seed(123)
        assert Loop(tiny(*options, LATEST, name=name)).run() == 0
        assert_same_end(Path(straight.output_dir), directory, lines)


def test_signals_are_heard_by_all_and_acted_on_by_the_one_that_saves():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(acts_alone=False) as other, other.in_reward():
        os.kill(os.getpid(), signal.SIGTERM)
        other.poll()
        flags = other.flags(torch.device("cpu"))
        assert other.status == 143 and flags.count_nonzero() == 1
        other.hear(flags.tolist())
        with pytest.raises(Stop):
            other.poll()
    main = StopRequest()
    main.hear([0.0, 0.0, 0.0])
    main.poll()
    main.hear((flags / 4).tolist())  # the mean over four processes
    assert main.status == 143
    with pytest.raises(Stop):
        main.poll()
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.status == 0, "under nohup"
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def of_reward(error):
    def fail(loop):
        def reward(images, prompts, metadata):
            if loop.iteration == 2:
                raise error
            return torch.linspace(0, 1, len(images))

        put(loop, "digits_judge", reward)

    return fail


def of_recipe(loop):
    loop.task.credit = wrapped(loop.task.credit, lambda: loop.iteration == 2, lambda: {}["gone"])


def of_validation(loop):
    def reward(images, prompts, metadata):
        return torch.full((len(images),), float("nan" if loop.global_step == 2 else 1))

    put(loop, "digits_judge", reward)


@pytest.mark.parametrize(
    "fail, message",
    [
        (of_reward(SystemExit(0)), "step 3: reward.digits_judge: SystemExit: 0"),
        (of_reward(ZeroDivisionError("no")), "step 3: reward.digits_judge: ZeroDivision"),
        (of_recipe, "step 3: KeyError: 'gone'"),
        (of_validation, "validation after step 2: reward.digits_judge: nan for image 0"),
    ],
    ids=["exit", "exception", "recipe", "validation"],
)
def test_what_fails_ends_the_run_in_one_line_and_the_state_is_saved(tiny, lines, fail, message):
    every = 2 if fail is of_validation else 100
    loop = Loop(tiny("train.checkpointing_steps=100", f"validation.steps={every}"))
    fail(loop)
    with pytest.raises(RunError, match=f"^{message}.*; continue with .*latest$") as caught:
        loop.run()
    assert "\n" not in str(caught.value)
    directory = Path(loop.config.output_dir)
    assert [p.name for p in checkpoint.checkpoints(directory)] == ["checkpoint-2"]
    assert [record["step"] for record in lines(directory / "metrics.jsonl")] == [1, 2]


def test_a_failing_run_exits_with_1_in_one_line(tiny_file, monkeypatch, capsys):
    from flowkern.cli import main

    monkeypatch.setattr(FlowTask, "credit", lambda *_: {}["gone"])
    assert main(["train", str(tiny_file("data.test_prompts=null"))]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("flowkern: step 1: KeyError: 'gone'; no step was finished")


def test_ctrl_c_after_a_stop_ends_python_without_a_word(tiny_file, monkeypatch):
    from flowkern.cli import main

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Loop, "run", lambda self: 130)
    try:
        assert main(["train", str(tiny_file())]) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_nothing_half(tiny, lines):
    loop = Loop(tiny("data.test_prompts=null"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            RunError, match=r"checkpoint-2 cannot be written: .*; no checkpoint is there, "
        ) as caught:
            loop.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "too large" in str(caught.value) and str(caught.value).count("cannot be written") == 1
    directory = Path(loop.config.output_dir)
    assert not [p for p in directory.iterdir() if "checkpoint" in p.name]
    assert [record["step"] for record in lines(directory / "metrics.jsonl")] == [1, 2]


def test_a_restart_before_the_first_checkpoint_begins_again(tiny, lines):
    config = tiny("train.checkpointing_steps=100", "train.steps=2", LATEST)
    loop = Loop(config)
    loop.begin()
    loop.validate_if_due(-1)
    loop.directory.log(loop.step())  # killed here
    for name, count in (("metrics.jsonl", 1), ("validation.jsonl", 1)):
        assert len(lines(loop.directory.path / name)) == count
    with pytest.raises(ConfigError, match="holds a run already"):
        Loop(tiny("train.steps=2")).begin()
    assert Loop(config).run() == 0
    assert [record["step"] for record in lines(loop.directory.path / "metrics.jsonl")] == [1, 2]
    assert [record["step"] for record in lines(loop.directory.path / "validation.jsonl")] == [0, 2]


def test_a_resume_takes_new_optimizer_options_and_notes_them(tiny, capsys):
    assert Loop(tiny("train.steps=2", "data.test_prompts=null")).run() == 0
    changed = (
        "train.learning_rate=1e-2", "train.adam_beta1=0.5", "train.adam_weight_decay=0.1",
        "train.lr_scheduler=linear", "train.steps=4", "data.test_prompts=null",
    )  # fmt: skip
    loop = Loop(tiny(*changed, LATEST))
    loop.begin()
    (group,) = loop.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 0.1)
    assert group["lr"] == pytest.approx(1e-2 * (4 - 2) / 4), "half of the schedule is over"
    assert loop.optimizer.state, "the moments are kept"
    assert "train.adam_beta1: 0.9 until step 2, 0.5 from there" in capsys.readouterr().err
    assert "learning_rate: 0.003" in (loop.directory.path / "config-2.yaml").read_text()
    loop.advance()
    assert group["lr"] == 0
    other = tmp_prompts(loop.directory.path, loop.config.data.train_prompts)
    with pytest.raises(ConfigError, match="data.train_prompts: holds other prompts"):
        Loop(tiny(*changed, LATEST, f"data.train_prompts={other}")).begin()
    with pytest.raises(ConfigError, match="lora.alpha: got 16, but the run .* has 32"):
        Loop(tiny(*changed, LATEST, "lora.alpha=16")).begin()


def tmp_prompts(directory: Path, path: str) -> Path:
    other = directory / "other.jsonl"
    lines = Path(path).read_text().splitlines()
    other.write_text("\n".join(lines[1:] + lines[:1]))
    return other


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_batch_that_teaches_nothing_counts_and_moves_nothing(tiny, kl_coef):
    options = ("train.adam_weight_decay=0.5", "train.lr_scheduler=linear")
    loop = Loop(tiny(*options, f"algorithm.kl_coef={kl_coef}"))
    loop.step()
    for name in loop.task.rewards:
        put(loop, name, lambda images, prompts, metadata: torch.ones(len(images)))
    weights = [p.detach().clone() for p in loop.parameters]
    moments = json.dumps([float(s["exp_avg_sq"].sum()) for s in loop.optimizer.state.values()])
    (record,) = loop.step()
    after = json.dumps([float(s["exp_avg_sq"].sum()) for s in loop.optimizer.state.values()])
    is_unmoved = all(map(torch.equal, weights, loop.parameters)) and moments == after
    assert is_unmoved == (kl_coef == 0) == (record["grad_norm"] == 0)
    assert record["step"] == loop.global_step == 2 and record["zero_std_ratio"] == 1
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 / 2), "the schedule goes on"
