"""flowkern doctor on two processes: each looks at its share, one says what all found."""

import json

import pytest
import yaml

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from flowkern.train.config import to_dict
from flowkern.train.doctor import Finding, Level, Report, together_of

PROGRAM = """
import sys, contextlib, gc, io, os, weakref
from pathlib import Path
import torch.distributed
from accelerate import Accelerator
from flowkern.cli import main
def watched(accelerator, end=Accelerator.end_training):
    groups.append(weakref.ref(torch.distributed.group.WORLD))
    end(accelerator)
said, groups, Accelerator.end_training = io.StringIO(), [], watched
with contextlib.redirect_stdout(said):
    status = main(["doctor", *sys.argv[2:]])
gc.collect()
assert [group() for group in groups] != [None]  # to let go of one may wait for ever
Path(sys.argv[1], f"{os.environ['RANK']}.txt").write_text(f"{status}\\n{said.getvalue()}")
"""


@pytest.mark.long(15)
def test_two_processes_print_once_what_both_found(tiny, on_processes, tmp_path):
    config, program, out = (tmp_path / name for name in ("config.yaml", "program.py", "out.json"))
    config.write_text(yaml.safe_dump(to_dict(tiny())))
    program.write_text(PROGRAM)
    on_processes(2, program, tmp_path, config, "--json", out)
    main, other = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert main.startswith("0\n") and "OK: the ratio is 1" in main and other == "0\n"
    assert "in each of 2 processes" in " ".join(main.split())
    report = json.loads(out.read_text())
    assert report["is_sound"] and report["facts"]["processes"] == 2
    # Four prompts of four images, all in two calls of one level; both processes' are counted.
    assert {level["choices"] for level in report["shapes"]["equal"]} == {16}


def test_what_one_process_finds_is_the_verdict_of_all():
    level = Level(0.9, 4, 1.0, 1.0, 0.0, 0.0)
    facts = {"memory": {"peak_gb": 1.0}}
    sound = Report(facts, 1e-4, {"equal": [level]}, [], [])
    off = Level(0.9, 4, 0.9, 1.2, 0.2, 0.1)
    found = [Finding("dropout", "on", "equal", 0.2, 2000.0)]
    other = Report({"memory": {"peak_gb": 2.0}}, 1e-4, {"equal": [off]}, found, [])
    for reports in ((sound, other), (other, sound), (sound, other, other)):
        both = together_of(reports)
        assert not both.is_sound and list(both.findings) == found
        assert both.shapes["equal"] == [Level(0.9, 4 * len(reports), 0.9, 1.2, 0.2, 0.1)]
        assert both.facts["memory"]["peak_gb"] == 2.0
    assert together_of([sound]) is sound
