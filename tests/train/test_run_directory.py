"""The run directory under kills, broken files, full disks, other runs and other configurations."""

import errno
import json
import os
import shutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
from flowkern.train import checkpoint, durable, run_directory
from flowkern.train.config import ConfigError
from flowkern.train.lock import Lock

TREE = {"seed": 0, "lora": {"rank": 4}, "train": {"learning_rate": 1e-3, "steps": 8}}
CHANGES_FILES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


def fill(step):
    def write(directory: Path) -> None:
        (directory / "ema").mkdir()
        (directory / "ema" / "adapter.bin").write_bytes(b"\x01" * 100)
        (directory / "state.pt").write_text(str(step) * 100)
        (directory / "config.yaml").write_text(run_directory.dump(TREE))

    return write


@pytest.fixture
def a_run(tmp_path) -> Path:
    """Six steps with a checkpoint at every second, and a note of somebody's in the metrics."""
    directory = tmp_path / "a_run"
    for step in range(7):
        if step:
            durable.append_line(directory / "metrics.jsonl", {"step": step, "kl": 0.5})
        if step % 2 == 0:
            directory.mkdir(exist_ok=True)
            durable.append_line(directory / "validation.jsonl", {"step": step})
            (directory / "samples").mkdir(exist_ok=True)
            (directory / f"samples/step-{step}.png").write_bytes(b"png")
            if step:
                checkpoint.write(directory, step, fill(step))
    (directory / "config.yaml").write_text(run_directory.dump(TREE))
    return directory


def killed_at(event: int, work) -> bool:
    """Run `work` in a process that dies at its event'th change of a file; did it get that far?

    A file that is opened to be written then holds one byte of what was to come.
    """
    child = os.fork()
    if child == 0:
        left = [event]

        def hook(name, arguments):
            is_write = name == "open" and isinstance(arguments[2], int) and arguments[2] & 3
            if left[0] < 0 or not (is_write or name in CHANGES_FILES):
                return
            left[0] -= 1
            if left[0] < 0:
                if is_write and not arguments[2] & os.O_APPEND:
                    Path(arguments[0]).write_bytes(b"x")
                os._exit(9)

        try:
            sys.addaudithook(hook)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def commit(directory):
    for step in (7, 8):
        durable.append_line(directory / "metrics.jsonl", {"step": step})
    checkpoint.write(directory, 8, fill(8), limit=2)


def commit_again(directory):
    checkpoint.write(directory, 6, fill(6))


def resume(directory):
    tree = {**TREE, "train": {"learning_rate": 2e-3, "steps": 8}}
    run_directory.resume(directory, directory / "checkpoint-2", 2, tree)


def overwrite(directory):
    run_directory.begin(directory, overwrite=True, is_restart=False)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "work, ends, events",
    [
        (commit, {6, 8}, 20),
        (commit_again, {4, 6}, 10),
        (resume, {2, 4, 6}, 20),
        (overwrite, {None, 2, 4, 6}, 25),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_killed_at_any_change_of_a_file_the_run_goes_on_from_a_sound_state(
    a_run, tmp_path, work, ends, events
):
    seen, event = set(), 0
    while True:
        directory = tmp_path / f"killed-{event}"
        shutil.copytree(a_run, directory)
        was_killed = killed_at(event, partial(work, directory))
        latest = checkpoint.find_checkpoint("latest", directory)
        step = None if latest is None else checkpoint.step_of(latest)
        seen.add(step)
        if latest is None:
            run_directory.begin(directory, overwrite=False, is_restart=True)
        else:
            run_directory.resume(directory, latest, step, TREE)
        steps = [r["step"] for r in durable.read_lines(directory / "metrics.jsonl")]
        assert steps == list(range(1, (step or 0) + 1)), event
        steps = [r["step"] for r in durable.read_lines(directory / "validation.jsonl")]
        assert steps == ([] if step is None else list(range(0, min(step, 6) + 1, 2))), event
        names = {path.name for path in directory.glob("checkpoint-*")}
        assert not [n for n in names if n.endswith((durable.PARTIAL, durable.DELETED))], event
        assert all(checkpoint.broken(directory / name) is None for name in names)
        shutil.rmtree(directory)
        if not was_killed:
            break
        event += 1
    assert event >= events, "the places that can be killed are found"
    assert seen == ends, "and each of the states in between is met"


def damage(kind):
    def do(path: Path):
        content = path.read_bytes()
        if kind == "missing":
            path.unlink()
        else:
            flipped = bytes([content[0] ^ 1]) + content[1:]
            made = {"truncated": content[:-7], "zero": bytes(len(content)), "flipped": flipped}
            path.write_bytes(made[kind])

    return do


@pytest.mark.parametrize("name", ["state.pt", "ema/adapter.bin", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("kind", ["truncated", "zero", "missing", "flipped"])
def test_a_broken_checkpoint_is_named_and_the_last_sound_one_taken(a_run, capsys, kind, name):
    damage(kind)(a_run / "checkpoint-6" / name)
    assert checkpoint.find_checkpoint("latest", a_run) == a_run / "checkpoint-4"
    message = capsys.readouterr().err
    assert f"checkpoint-6 is broken: {name} " in message and message.count("\n") == 1
    with pytest.raises(ConfigError, match=f"resume_from_checkpoint: .*is broken: {name} "):
        checkpoint.find_checkpoint(str(a_run / "checkpoint-6"), a_run)
    for step in (2, 4):
        (a_run / f"checkpoint-{step}/state.pt").unlink()
    with pytest.raises(ConfigError, match="no checkpoint of .* is whole: .*checkpoint-6 is broken"):
        checkpoint.find_checkpoint("latest", a_run)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(a_run):
    def full(directory):
        (directory / "state.pt").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="checkpoint-10 cannot be written: .*No space left"):
        checkpoint.write(a_run, 10, full)
    assert checkpoint.checkpoints(a_run)[-1].name == "checkpoint-6"
    assert not list(a_run.glob("*.partial"))


def test_a_file_that_grows_is_read_once(tmp_path):
    path, read = tmp_path / "metrics.jsonl", []
    file = durable.Growing(path, lambda r: read.append(r) or run_directory.rewards_of(r))
    assert file.records() == []
    path.write_bytes(
        b'a note\n{"step": 1, "reward/mean": 0.5, "kl": 1}\n{"step": 2, "kl": 2}\n{"st'
    )
    assert file.records() == file.records() == [{"step": 1, "reward/mean": 0.5}]
    with open(path, "ab") as more:
        more.write(b'ep": 3, "reward/mean": 0.75}\n')
    assert [r["step"] for r in file.records()] == [1, 3]
    assert len(read) == 4
    path.write_bytes(b'{"step": 1, "reward/mean": 0.25}\n')
    assert file.records() == [{"step": 1, "reward/mean": 0.25}]


def test_lines_that_are_no_records_never_raise_and_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    foreign = [
        b"a note",
        b"[1]",
        b'"x"',
        b"3",
        b"null",
        b"{}",
        b'{"step": "two"}',
        b"\xff\xfe",
        b"",
    ]
    records = [b'{"step": 1}', b'{"step": 2, "kl": NaN}', b'{"step": 3}']
    path.write_bytes(b"\n".join([records[0], *foreign, *records[1:], b'{"step": 4, "re']))
    assert [r["step"] for r in durable.read_lines(path)] == [1, 2, 3]
    durable.truncate_lines(path, 2)
    assert path.read_bytes().split(b"\n") == [records[0], *foreign, records[1], b""]
    path.write_bytes(b'{"step": 1}\n{"step": 2}')  # whole, but for its end
    durable.truncate_lines(path, 2)
    durable.append_line(path, {"step": 3, "kl": float("nan"), "loss": float("-inf"), "x": 0.5})
    assert path.read_text() == (
        '{"step": 1}\n{"step": 2}\n{"step": 3, "kl": null, "loss": null, "x": 0.5}\n'
    )


def test_a_line_that_cannot_be_written_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    durable.append_line(path, {"step": 1})

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        durable.append_line(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_directory_is_written_by_one_run_at_a_time(tmp_path):
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Lock(tmp_path)
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(OSError, match=f"in use by process {child} on {socket.gethostname()}; end"):
        Lock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = Lock(tmp_path)  # that of the killed one is stale
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release()
    assert not lock.path.exists()
    lock.path.write_text('{"host": "elsewhere", "pid": 7}')
    with pytest.raises(OSError, match="process 7 on elsewhere; if that run is gone, remove .*lock"):
        Lock(tmp_path)
    # Killed before it was written, or none of ours.
    for content in ("", "{}", "[]", '{"host": "x", "pid": 1e400}', "[" * 4000):
        lock.path.write_text(content)
        Lock(tmp_path).release()


def test_where_files_have_no_locks_the_process_is_asked_for(tmp_path, monkeypatch):
    def without(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", without)
    path, here = tmp_path / "run.lock", socket.gethostname()
    path.write_text(json.dumps({"host": here, "pid": os.getppid()}))
    with pytest.raises(OSError, match=f"in use by process {os.getppid()} on"):
        Lock(tmp_path)
    path.write_text(json.dumps({"host": here, "pid": 2**22 + 1}))  # above the largest there is
    Lock(tmp_path).release()


MODEL = {"path": "here", "quantization": None, "height": 64}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seed": 1}, "seed: got 1, but the run that is resumed has 0"),
        ({"lora": {"rank": 8}}, "lora.rank: got 8, .* has 4"),
        ({"algorithm": {"name": "awm"}}, "algorithm.name: got 'awm', .* has 'flow_grpo'"),
        (
            {"model": MODEL | {"path": "/elsewhere"}},
            "model.path: got '/elsewhere', .* has '.*here'",
        ),
        (
            {"model": MODEL | {"quantization": "int8"}},
            "model.quantization: got 'int8', .* has null",
        ),
        ({"model": MODEL | {"height": None}}, "model.height: got null, .* has 64"),
        ({"model": MODEL | {"attention_backend": "native"}}, "backend: got 'native', .* has null"),
        ({"model": MODEL | {"compile": True}}, "model.compile: got True, .* has False"),
        ({"algorithm": {"name": "flow_grpo", "kl_coef": 9.0}}, "kl_coef: got 9.0, .* has 0"),
        ({"train": {"ema_decay": 0.9}}, "train.ema_decay: got 0.9, .* has null"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_key(tmp_path, changed, message):
    """The last two of the model and the algorithm's are options that came after the run."""
    tree = {**TREE, "algorithm": {"name": "flow_grpo"}, "model": MODEL}
    (tmp_path / "config.yaml").write_text(run_directory.dump(tree))
    with pytest.raises(ConfigError, match=message):
        run_directory.refuse_other_run(tmp_path, tree | changed)
    later = {"path": str(Path("here").resolve()), "attention_backend": None, "compile": False}
    same = tree | {"model": MODEL | later, "output_dir": "other"}
    assert run_directory.refuse_other_run(tmp_path, same) == {}
    taken = tree | {"train": {"learning_rate": 2e-3, "steps": 8, "ema_decay": None}}
    assert run_directory.refuse_other_run(tmp_path, taken) == {"train.learning_rate": (1e-3, 2e-3)}


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\x00junk", None])
def test_a_sound_checkpoint_that_is_of_no_use_is_refused_in_a_line(a_run, content):
    found = a_run / "checkpoint-6"
    for name in ("config.yaml", "state.pt"):
        (found / name).unlink() if content is None else (found / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{found}/config.yaml: ") as refused:
        run_directory.refuse_other_run(found, TREE)
    assert "\n" not in str(refused.value)
    begins = f"train.resume_from_checkpoint: '{found}' cannot be used: "
    with pytest.raises(ConfigError, match=begins) as refused, checkpoint.taking(found):
        torch.load(found / "state.pt", weights_only=True)
    assert "\n" not in str(refused.value)


def test_the_configuration_until_a_change_stays(a_run):
    tree = {**TREE, "train": {"learning_rate": 2e-3, "steps": 8}}
    run_directory.resume(a_run, a_run / "checkpoint-6", 6, TREE)
    assert not list(a_run.glob("config-*.yaml")), "nothing changed"
    run_directory.resume(a_run, a_run / "checkpoint-6", 6, tree)
    kept = a_run / "config-6.yaml"
    assert kept.read_text() == run_directory.dump(TREE)
    run_directory.resume(a_run, a_run / "checkpoint-4", 4, TREE)
    assert not kept.exists(), "of a branch that is left"
