"""docs/first_run.md as a new user reads it: files and commands as they stand, on a tiny pipeline of
the same classes. Nothing is replaced but the model, its size, and how long it is trained.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import tiny
from accelerate.state import AcceleratorState
from diffusers import StableDiffusion3Pipeline

from flowkern.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/first_run.md").read_text()
COMMANDS = re.findall(r"^    ((?:flowkern|printf|cp) .*)$", PAGE, re.MULTILINE)
SMALL = [
    "model.path=model", "model.height=32", "model.width=32", "model.max_sequence_length=16",
    "train.steps=1", "algorithm.num_inference_steps=2", "algorithm.window=1",
    "algorithm.clip_range=1e-3",  # that of so small a latent
    "algorithm.group_size=2", "algorithm.prompts_per_rollout=2", "validation.num_inference_steps=2",
]  # fmt: skip
EVERY = os.environ.get("FLOWKERN_EVERY_CELL") == "1"


@pytest.mark.long(6)
def test_its_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one precision per process
    pipeline = tiny.pipeline("sd3")
    pipeline.save_pretrained("model")
    for file, content in re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        Path(file).write_text(content)
    ran = []
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] != "flowkern":
            subprocess.run(command, shell=True, check=True)
            continue
        is_look = words[1] == "doctor" and "--estimate" not in words
        if is_look and not ("run.yaml" in words and EVERY):  # as long as all of the others
            continue
        if "run.yaml" in words:
            words += SMALL
        if "train.resume_from_checkpoint=latest" in words:
            words += ["train.steps=2"]
        assert main(words[1:]) == 0, (command, capsys.readouterr().err)
        ran.append(words[1])
    assert ran[-6:] == ["train", "train", "report", "sample", "sample", "export"]
    for made in ("runs/first/report.html", "compared.png", "half.png", "first-lora/README.md"):
        assert Path(made).stat().st_size > 100, made
    (script,) = re.findall(r"```python\n(import.*?)```", PAGE, re.DOTALL)
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: pipeline)
    monkeypatch.setattr(type(pipeline), "__call__", Drawn(pipeline))
    exec(compile(script, "first_run.md", "exec"), {})
    assert pipeline.transformer.peft_config and Path("red.png").is_file()


class Drawn:
    """A call in two steps, of a size that the tiny VAE has."""

    def __init__(self, pipeline):
        self.pipeline, self.call = pipeline, type(pipeline).__call__

    def __call__(self, prompt, **options):
        small = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 2}
        return self.call(self.pipeline, prompt, **(options | small))
