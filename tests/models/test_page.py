"""docs/models.md as a new user reads it: its commands, on tiny pipelines of the families that they
name. Nothing is replaced but the model and its size.

The suite runs those of two families; FLOWKERN_EVERY_CELL=1 all of them.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import tiny
from accelerate.state import AcceleratorState

from flowkern.cli import main
from flowkern.models import MODELS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text()
FILES = re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^    ((?:flowkern|printf) .*)$", PAGE, re.MULTILINE)
SECTIONS = re.findall(r"^### ([^\n]*)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
PIPELINES = {
    "sd35_medium": "sd3",
    "flux1_dev": "flux",
    "flux2_dev": "flux2",
    "flux2_klein_4b": "klein",
    "qwen_image": "qwen_image",
    "z_image": "z_image",
    "chroma": "chroma",
    "wan21_1.3b": "wan",
    "wan22_ti2v_5b": "wan_ti2v",
    "wan22_a14b": "wan_a14b",
    "ltx_video": "ltx",
    "hunyuan_video": "hunyuan_video",
}
"""What stands for the model of a file in configs/models."""
SIZE = ["model.height=32", "model.width=32"]
EVERY = os.environ.get("FLOWKERN_EVERY_CELL") == "1"
CHOSEN = list(PIPELINES) if EVERY else ["z_image", "wan22_a14b"]


def of(name):
    """The commands that train and draw from a pipeline, which stand together."""
    (first,) = [i for i, one in enumerate(COMMANDS) if f"configs/models/{name}.yaml " in one]
    return COMMANDS[first : first + 2]


def test_every_family_has_a_section_with_commands():
    titles = ", ".join(title for title, _ in SECTIONS)
    assert all(name in titles for name in MODELS)
    assert all("    flowkern train configs/models/" in section for _, section in SECTIONS)
    assert {tiny.PIPELINES[name] for name in PIPELINES.values()} == set(tiny.PIPELINES.values())
    told = [command for name in PIPELINES for command in of(name)]
    assert sorted(told) == sorted(one for one in COMMANDS if one.startswith("flowkern "))


@pytest.mark.parametrize("name", CHOSEN)
def test_its_commands_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one precision per process
    Path("configs").symlink_to(ROOT / "configs")
    pipeline = tiny.pipeline(PIPELINES[name])
    pipeline.save_pretrained("model")
    for file, content in FILES:
        Path(file).write_text(content)
    for command in COMMANDS:
        if not command.startswith("flowkern "):
            subprocess.run(command, shell=True, check=True)
    train, sample = (shlex.split(command)[1:] for command in of(name))
    size = [*SIZE, "model.num_frames=9"] if hasattr(pipeline, "video_processor") else SIZE
    assert main([*train, "model.path=model", *size]) == 0, capsys.readouterr().err
    assert main(sample) == 0, capsys.readouterr().err
    output = Path(sample[-1])
    assert output.stat().st_size > 100
    run = Path(sample[1])
    assert (run / "checkpoint-2/pytorch_lora_weights.safetensors").is_file()
    (section,) = [text for _, text in SECTIONS if f"/{name}.yaml " in text]
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        if f'"{run}/' in block:
            exec(compile(block, "models.md", "exec"), {"pipe": pipeline})
            parts = [pipeline.transformer, pipeline.transformer_2]
            assert all(part.peft_config for part in parts)
