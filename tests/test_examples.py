"""Each example is run, in its quick form: what a user would type, and less of it."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from accelerate.state import AcceleratorState

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = [
    "train.steps=1", "algorithm.group_size=2", "algorithm.prompts_per_rollout=1",
    "algorithm.updates_per_rollout=1", "algorithm.num_inference_steps=4",
    "validation.num_prompts=1", "validation.num_inference_steps=2",
]  # fmt: skip
QUICK = {"own_reward": RUN, "own_algorithm": RUN, "drop_in": ["2"]}
QUICK["own_sampler"] = [*RUN, "algorithm.window=1"]


def test_each_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == QUICK.keys()


@pytest.mark.parametrize("name", QUICK)
def test_it_runs(name, tmp_path, monkeypatch, capsys, preloaded):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one precision per process
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *QUICK[name]])
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does with a script's folder
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, capsys.readouterr().err
    said = capsys.readouterr()
    (record,) = Path("runs").glob("*/metrics.jsonl") if name != "drop_in" else [None]
    assert record.stat().st_size if record else "rollout 2: ink " in said.out
