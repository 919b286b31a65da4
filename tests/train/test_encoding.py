"""What a run encodes of its prompts, and when it loads text encoders for it."""

import errno
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from flowkern.models import load_model, text
from flowkern.models.sd3 import SD3
from flowkern.train import loading
from flowkern.train.config import ConfigError
from flowkern.train.loop import Loop

DIGITS = Path(__file__).resolve().parents[2] / "assets/digits-sd3"


@pytest.fixture
def encoded(monkeypatch, preloaded):
    """What is encoded, and how often text encoders are loaded for it."""
    monkeypatch.setattr(loading, "load_model", load_model)
    asked, loads, encode, load = [], [], SD3.encode_rows, text.load_encoders
    monkeypatch.setattr(
        SD3, "encode_rows", lambda self, prompts: asked.extend(prompts) or encode(self, prompts)
    )
    monkeypatch.setattr(
        text, "load_encoders", lambda at, dtype: loads.append(at) or load(at, dtype)
    )
    return asked, loads


def texts(prompts):
    return {one["prompt"] for one in prompts}


def test_a_run_encodes_each_of_its_prompts_once_and_keeps_no_encoder(
    tiny, tmp_path, encoded, monkeypatch
):
    """Those that it will draw, and no others; what finds them in the folder loads no encoder, and
    may have none."""
    asked, loads = encoded
    shutil.copytree(DIGITS, tmp_path / "model")
    here = (f"model.prompt_cache={tmp_path / 'rows'}", f"model.path={tmp_path / 'model'}")
    loop = Loop(tiny(*here))
    assert loop.run() == 0
    drawn = set().union(*(texts(loop.task.draw_prompts(i)) for i in range(4)))
    held_out = texts(loop.task.validation.prompts)
    assert sorted(asked) == sorted(drawn | held_out | {""}) and len(held_out) == 6
    assert loop.task.model.pipeline.text_encoder is loop.task.model.pipeline.text_encoder_3 is None
    assert len(loads) == 1
    count = len(asked)
    for folder in (tmp_path / "model").glob("text_encoder*"):
        shutil.rmtree(folder)
    other = Loop(tiny(*here, "train.learning_rate=1e-5", "train.steps=2", name="other"))
    assert other.run() == 0 and len(asked) == count and len(loads) == 1
    with pytest.raises(ConfigError, match="^model.path: .*/model' lacks text_encoder/, which its"):
        Loop(tiny(*here, "train.steps=40", name="third")).run()
    with pytest.raises(ConfigError, match="^model.path: .*/model' lacks text_encoder/, which its"):
        Loop(tiny(here[1], name="third"))
    with pytest.raises(ConfigError, match="^model.prompt_cache: Not a directory: '/dev/null/"):
        Loop(tiny("model.prompt_cache=/dev/null/rows", name="third")).run()
    full = OSError(errno.ENOSPC, "No space left on device")  # a write has no file's name to say
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", Mock(side_effect=full))
        with pytest.raises(ConfigError, match="^model.prompt_cache: No space left on .*/new'$"):
            Loop(tiny(f"model.prompt_cache={tmp_path / 'new'}", name="third")).run()


def test_a_resume_encodes_what_the_rest_of_the_run_needs(tiny, encoded):
    asked, loads = encoded
    assert Loop(tiny("train.steps=3")).run() == 0
    asked.clear(), loads.clear()
    loop = Loop(tiny("train.steps=4", "train.resume_from_checkpoint=latest"))
    assert loop.run() == 0 and len(loads) == 1
    rest = texts(loop.task.draw_prompts(3)) | texts(loop.task.validation.prompts) | {""}
    assert sorted(asked) == sorted(rest)
    before = set().union(*(texts(loop.task.draw_prompts(i)) for i in range(3)))
    assert before - rest, "some are of the past alone"
