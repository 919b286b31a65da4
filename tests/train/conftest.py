"""A tiny run of the demo model."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from flowkern.train.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "assets/digits-sd3"
CONFIG = ROOT / "configs/digits/flow_grpo.yaml"
TINY = [
    f"data.train_prompts={ROOT / 'assets/digits-prompts/train.jsonl'}",
    f"data.test_prompts={ROOT / 'assets/digits-prompts/test.jsonl'}",
    "algorithm.group_size=4",
    "algorithm.prompts_per_rollout=4",
    "algorithm.num_inference_steps=3",
    "algorithm.updates_per_rollout=1",
    "train.steps=4",
    "train.checkpointing_steps=2",
    "train.max_batch=16",
    "validation.num_prompts=6",
    "validation.num_inference_steps=2",
]


RUNS = """
import json, sys
from flowkern.train.config import from_dict
from flowkern.train.distributed import finish
from flowkern.train.loop import Loop
for tree in json.loads(sys.argv[1]):
    loop = Loop(from_dict(tree))
    loop.begin()
    loop.advance()
finish(loop.accelerator)
"""


@pytest.fixture(scope="session")
def short(tmp_path_factory) -> Path:
    """The demo's pipeline with two blocks instead of four, where there is what reads it."""
    if find_spec("safetensors") is None:
        return DIGITS
    from loaded_once import shortened

    return shortened(DIGITS, tmp_path_factory.mktemp("short") / DIGITS.name)


@pytest.fixture(scope="session")
def on_processes(short):
    """on_processes(count, file, *arguments)"""
    import forked

    with forked.server(short) as run:
        yield run


@pytest.fixture
def train_on(on_processes, tmp_path):
    """train_on(count, configuration, ...): the runs, one after another, on so many processes."""
    from flowkern.train.config import to_dict

    def train(count: int, *configs: Config) -> None:
        program = tmp_path / "runs.py"
        program.write_text(RUNS)
        on_processes(count, program, json.dumps([to_dict(config) for config in configs]))

    return train


@pytest.fixture
def drawn():
    """A test that asks for it has the pictures of its runs drawn."""


@pytest.fixture
def undrawn(request, monkeypatch):
    """Drawing is half of a tiny run."""
    if "drawn" in request.fixturenames or find_spec("matplotlib") is None:
        return
    without_drawing(monkeypatch.setattr)


def without_drawing(setattr):
    """Pictures are one pixel."""
    from torch import zeros

    from flowkern.train import tracking

    def save(path, *_, **__):
        tracking.save_image(path, zeros(3, 1, 1))

    setattr(tracking, "save_grid", save)
    setattr(tracking, "save_curves", save)


@pytest.fixture
def tiny(tmp_path, undrawn, short, loaded, monkeypatch) -> Callable[..., Config]:
    """tiny("key=value", ..., name="run"): a configuration whose output_dir is tmp_path/name."""
    from loaded_once import read_once

    read_once(monkeypatch.setattr, short, loaded)

    def make(*overrides: str, name: str = "run") -> Config:
        places = [f"model.path={short}", f"output_dir={tmp_path / name}"]
        return load_config(CONFIG, [*TINY, *places, *overrides])

    return make


@pytest.fixture
def tiny_file(tmp_path, tiny) -> Callable[..., Path]:
    """The same as a file, for commands."""
    import yaml

    from flowkern.train.config import to_dict

    def make(*overrides: str, name: str = "run") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(to_dict(tiny(*overrides, name=name))))
        return path

    return make


@pytest.fixture
def lines() -> Callable[[Path], list[dict]]:
    """The records of a .jsonl file, without what a clock or the machine decides."""

    def read(path: Path) -> list[dict]:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        loose = ("timing_s/", "throughput/", "memory/")
        return [{k: v for k, v in r.items() if not k.startswith(loose)} for r in records]

    return read
