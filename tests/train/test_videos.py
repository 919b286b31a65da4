"""A run on videos, from prompts to what people see of it."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from PIL import Image

from flowkern.cli import main
from flowkern.train.loop import Loop

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # not a package
import tiny as pipelines

VIDEO = ["model.height=32", "model.width=64", "model.num_frames=5"]
REWARD = """
def brightness(images, prompts, metadata):
    assert images.shape[1:] == (5, 3, 32, 64) and 0 <= images.min() and images.max() <= 1
    return images.mean((1, 2, 3, 4)), {"change": images.diff(dim=1).abs().mean((1, 2, 3, 4))}
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    """options(family): what makes a tiny run one of its videos."""
    (tmp_path / "videos_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def of(family):
        pipelines.pipeline(family).save_pretrained(tmp_path / family)
        return [
            f"model.path={tmp_path / family}", *VIDEO, "lora.target_modules=null",
            "reward={'videos_reward:brightness': {}}", "train.steps=1", "validation.num_prompts=3",
            "validation.guidance_scale=2", "algorithm.guidance_scale=2", "train.max_batch=4",
            "algorithm.prompts_per_rollout=2", "algorithm.group_size=2",
        ]  # fmt: skip

    return of


def test_a_run_on_videos_is_scored_and_shown(options, tiny, tmp_path, drawn, capsys, monkeypatch):
    """With two networks and a scale of each: three steps lie on both sides of the boundary."""
    config = tiny(*options("wan_a14b"), "model.guidance_scale_2=1.5", name="run")
    assert Loop(config).run() == 0
    (record,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert record["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert 0 < record["reward/mean"] < 1 and record["info/videos_reward:brightness/change"] > 0
    with Image.open(tmp_path / "run/samples/step-1.png") as picture:
        assert picture.width == 693, "strips of four frames, 6.3 inches"
    monkeypatch.chdir(tmp_path)
    sample = ["sample", "run", "--prompt", "a red cat", "--num-inference-steps", "2", "--output"]
    assert main([*sample, "a.webp"]) == 0
    with Image.open("a.webp") as picture:
        assert picture.n_frames == 5 and picture.size == (64, 32)
    assert main([*sample, "a.jpg"]) == 2
    error = capsys.readouterr().err
    assert "--output: got 'a.jpg' for a video, expected a name in .png, .webp or" in error
    assert main([*sample, "a.jpg", "--num-images", "2"]) == 0


def test_what_a_model_cannot_be_is_named(options, tiny):
    from flowkern.checks import ConfigError

    for family, option, message in (
        ("wan", "num_frames=6", "model.num_frames: got 6, expected 4 k"),
        ("wan", "guidance_scale_2=3", "model.guidance_scale_2: got 3.0, but this pipeline has one"),
    ):
        with pytest.raises(ConfigError, match=message):
            Loop(tiny(*options(family), f"model.{option}"))
    with pytest.raises(ConfigError, match="model.num_frames: got 5, but StableDiffusion3Pipe"):
        Loop(tiny("model.num_frames=5"))
