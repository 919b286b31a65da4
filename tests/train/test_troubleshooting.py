"""docs/troubleshooting.md: its commands as they are written. Their keys and options are looked at;
all of them run with FLOWKERN_EVERY_CELL=1, in minutes.
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
pytest.importorskip("yaml")

from flowkern.cli import _as_overrides, _parser
from flowkern.train.config import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
COMMANDS = re.findall(r"^    (\S.*)$", PAGE, re.MULTILINE)
SAYS = {
    "flowkern doctor configs": "OK: the ratio is 1",
    "flowkern doctor --estimate": "fits: ",
    "tail": '"grad_norm"',
    "head": '"timing_s/rollout"',
    "timeout": 'File "',
    "python": ".",
}
"""What comes out, by how a command begins."""


@pytest.mark.parametrize("command", [c for c in COMMANDS if "flowkern" in c.split()])
def test_a_command_is_one(command):
    words = shlex.split(command)
    words = words[words.index("flowkern") + 1 :]
    options = _parser()[0].parse_args(_as_overrides(words))
    if words[0] != "sample":
        files = [word for word in options.arguments if word.endswith(".yaml")]
        load_config([ROOT / file for file in files], [w for w in options.arguments if "=" in w])


@pytest.mark.skipif(
    os.environ.get("FLOWKERN_EVERY_CELL") != "1", reason="FLOWKERN_EVERY_CELL=1: minutes"
)
def test_every_command_runs(tmp_path):
    for name in ("configs", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, given in {"python": "", "flowkern": " -m flowkern"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{given} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    for command in COMMANDS:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        assert "timeout" in command or done.returncode == 0, said[-2000:]
        for start, wanted in SAYS.items():
            assert not command.startswith(start) or wanted in said, said[-2000:]
    assert (tmp_path / "look.png").stat().st_size > 100
