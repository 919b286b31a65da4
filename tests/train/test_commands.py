"""The commands: signals, sampling, mistakes."""

import math
import os
import signal
import sys

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save

from flowkern.models import Guidance


def test_the_second_ctrl_c_exits_at_once_and_a_launchers_sigterm_is_none(monkeypatch):
    from flowkern.train.stop import StopRequest

    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.status == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.status == 128 + signal.SIGINT and not exits
        os.kill(os.getpid(), signal.SIGINT)
        assert exits == [128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_sample_loads_the_model_as_training_did(tiny, tmp_path, monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    from flowkern.cli import main
    from flowkern.train import checkpoint, loading
    from flowkern.train.loop import Loop

    seen, load = [], loading.load_model

    def loaded(path, **options):
        seen.append({**options, "device": str(options["device"])})
        return load(path, **options)

    monkeypatch.setattr(loading, "load_model", loaded)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one precision per process
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = ["train.mixed_precision=bf16", "model.max_sequence_length=5"]
    loop = Loop(tiny(*options, "model.attention_backend=native"))
    loop.begin()
    loop.checkpoint()
    monkeypatch.chdir(tmp_path)
    arguments = ["sample", "run", "--prompt", "the digit 3", "--num-inference-steps", "2"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "sample.png\n" and (tmp_path / "sample.png").is_file()
    assert seen[0] == seen[1] and seen[1]["dtype"]["default"] == torch.bfloat16
    assert seen[1]["max_sequence_length"] == 5
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    with monkeypatch.context() as patch:
        patch.setattr("flowkern.models.sd3.SD3.guidance", Guidance("none"))
        assert main([*arguments, "--guidance-scale", "3"]) == 2
        said = "flowkern: --guidance-scale: got 3.0, expected at most 1: this model takes no guid"
        assert said in capsys.readouterr().err
    own = (saved / "config.yaml").read_text()
    for name, run, begins, ends in (
        ("sage", "native", "--attention-backend: got 'sage', but Sage Att", "flex, native"),
        ("", "native", "--attention-backend: got '', expected one of", "xformers"),
        (None, "_native_cudnn", "model.attention_backend: got '_n", "NAME draws through another"),
        ("_native_math", "_native_cudnn", None, None),
    ):
        changed = own.replace("attention_backend: native", f"attention_backend: {run}")
        changed = changed.replace("quantization: null", "quantization: int8")
        (saved / "config.yaml").write_text(changed)
        (saved / "manifest.json").unlink()
        checkpoint._seal(saved)
        flag = [] if name is None else ["--attention-backend", name]
        assert main([*arguments, *flag]) == (2 if begins else 0)
        said = capsys.readouterr().err.strip()
        assert "model.quantization: int8 was for training; drawn unquantized" in said
        error = said.split("\n")[-1]
        assert not begins or (error.startswith(f"flowkern: {begins}") and error.endswith(ends))
    (saved / "config.yaml").write_text(own)
    weights = load_file(saved / "adapter_model.safetensors")
    broken = save({name: weight * math.nan for name, weight in weights.items()})
    (tmp_path / "sample.png").unlink()
    for content, status, begins, ends in (
        (b"of another version", 2, "checkpoint: 'run/check", "header too large"),
        (broken, 1, "model: 1 of 1 image is not finite", "(bf16 where fp16 overflows)"),
    ):
        (saved / "adapter_model.safetensors").write_bytes(content)
        (saved / "manifest.json").unlink()
        checkpoint._seal(saved)  # as its manifest says, and of no use
        capsys.readouterr()
        assert main(arguments) == status and not (tmp_path / "sample.png").exists()
        (error,) = [line for line in capsys.readouterr().err.split("\n") if "flowkern: " in line]
        assert error.startswith(f"flowkern: {begins}") and error.endswith(ends)


def test_errors_are_one_line(capsys, monkeypatch):
    from flowkern.cli import main

    for override, message in (
        (["configs/digits"], "Is a directory"),
        (["configs/digits/flow_grpo.yaml", "train.steps=["], "train.steps: got '[', not YAML"),
        # Before the model is loaded, which is not there either.
        (
            ["configs/digits/flow_grpo.yaml", "reward.digits_judge.zz=1", "model.path=nowhere"],
            "reward.digits_judge.zz: unknown key; known are weight, kind, timeout, scale,",
        ),
    ):
        assert main(["train", *override]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("flowkern: ") and error.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yaml", None)
        assert main(["train", "configs/digits/flow_grpo.yaml"]) == 1
        error = capsys.readouterr().err
        assert error.endswith("pip install 'flowkern[train]'\n") and error.count("\n") == 1
        with pytest.raises(ImportError):
            main(["train", "configs/digits/flow_grpo.yaml", "--traceback"])
    assert main(["train", "configs/digits/flow_grpo.yaml", "train.stepz=3"]) == 2
    assert capsys.readouterr().err == (
        "flowkern: train.stepz: unknown key; did you mean 'train.steps'?\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0 and "Ctrl-C" in capsys.readouterr().out
