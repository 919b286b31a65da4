"""What a run reports: each key has its line, and trackers get what the files get."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from legend import unknown, unused

from flowkern.rl.divergence import DivergenceMask
from flowkern.rl.objectives import LOG_RATIO, OFF, RatioClip
from flowkern.train import metrics
from flowkern.train.config import ConfigError
from flowkern.train.distributed import make_accelerator
from flowkern.train.errors import RunError
from flowkern.train.loop import Loop
from flowkern.train.ratio_guard import RatioGuard
from flowkern.train.run_directory import RunDirectory
from flowkern.train.tracking import save_image
from flowkern.train.turn_figures import Told, evaluated, figures

TWO = "algorithm.updates_per_rollout=2"


class Half:
    """A reward that leaves the second half of the images out, and says something beside."""

    may_fail = True

    def __call__(self, images, prompts, metadata):
        score = images.flatten(1).mean(1)
        score[len(score) // 2 :] = float("nan")
        return score, {"entry": torch.ones(len(images))}


def test_each_key_has_a_line_and_each_line_a_key(tiny):
    """test_algorithms.py looks for the first of every algorithm, test_planner.py of an agent."""
    options = ("reward.half.kind=test_metrics:Half", "train.max_failed_rewards=1")
    loop = Loop(tiny(TWO, "train.steps=4", "reward.half.weight=0", *options))
    assert loop.run() == 0
    files = ("metrics.jsonl", "validation.jsonl")
    texts = [(Path(loop.config.output_dir) / name).read_text() for name in files]
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    told = Told(1, "easy", 1.0, {"a": 1.0}, 2, 1, 0, 1, 0, 0, 5, 5)
    of_agents = [figures([told], 0.0), evaluated([told], [told]), {"entropy": 0.0}]
    assert not unknown(*records, *of_agents)
    assert not unused({key for record in (*records, *of_agents) for key in record})
    first, second, third, _ = records[:4]
    assert first["lr"] == loop.config.train.learning_rate and first["replay/off"] == 0
    assert first["failed_rewards/half"] == 8 and third["group_std"] > 0
    levels = {k: v for k, v in second.items() if k.startswith("ratio_mean/")}
    assert len(levels) == 2
    assert sum(levels.values()) / 2 == pytest.approx(second["ratio_mean"], abs=1e-6)


def test_spread_is_of_the_images_of_a_prompt_that_have_a_score():
    nan = float("nan")
    scores = {"a": torch.tensor([[0.0, 1.0, nan], [2.0, 2.0, 2.0]]), "b": torch.zeros(2, 3)}
    advantage = torch.tensor([[[1.0, -5.0, nan], [5.0, 0.0, 4.9]]])
    found = metrics.spread(scores, {"a": 2.0, "b": 1.0}, advantage, 5.0)
    assert found == {"group_std": 0.5, "adv_clip_ratio": pytest.approx(2 / 5)}


def test_tensorboard_has_scalars_of_both_kinds_and_the_grids(tiny, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = told(tiny("train.report_to=tensorboard"))
    board = EventAccumulator(str(directory / "flowkern"), {"images": 0})
    board.Reload()
    found = {t: [(e.step, e.value) for e in board.Scalars(t)] for t in board.Tags()["scalars"]}
    assert found["lr"] == [(1, 0.5)]
    assert found["validation/reward/mean"] == [(0, 0.25), (1, 0.75)]
    assert [image.step for image in board.Images("samples")] == [0]


def told(config):
    """The directory of a run that was told a validation with a picture, a step, and one without."""
    directory = RunDirectory(config, make_accelerator(config))
    directory.claim()
    directory.prepare(None, 0, {})
    save_image(directory.path / "samples/step-0.png", torch.zeros(3, 2, 4))
    directory.log_validation(0, {"reward/mean": 0.25})
    directory.log([{"step": 1, "lr": 0.5}])
    directory.log_validation(1, {"reward/mean": 0.75})
    directory.accelerator.end_training()
    directory.release()
    return directory.path


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_boards_on_the_network_get_the_same(tiny, monkeypatch, name):
    """Through accelerate's own class for each, on a module that writes down what it is told."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    said, seen = [], {}
    board = SimpleNamespace(
        log=lambda values, step=None: said.append((step, values)),
        finish=lambda: said.append("finished"),
    )

    class Config(dict):
        def update(self, values, **_):
            super().update(values)

    fake = ModuleType(name)
    fake.init = lambda project, **_: seen.setdefault("project", project) and board
    fake.Image = lambda what: ("picture", getattr(what, "shape", what))
    fake.config = Config()
    monkeypatch.setitem(sys.modules, name, fake)
    there = [*tracking._available_trackers, LoggerType(name)]
    monkeypatch.setattr(tracking, "_available_trackers", there)
    config = tiny(f"train.report_to={name}")
    place = str(told(config) / "samples/step-0.png")
    assert seen["project"] == "flowkern" and fake.config["train.steps"] == 4
    picture = said.pop(1)
    assert picture[0] == 0 and [*picture[1]] == ["samples"]
    assert ("(2, 4, 3)" if name != "trackio" else place) in str(picture[1]["samples"])
    assert said == [
        (0, {"validation/reward/mean": 0.25}),
        (1, {"step": 1, "lr": 0.5}),
        (1, {"validation/reward/mean": 0.75}),
        "finished",
    ]
    fake.init = lambda **_: 1 / 0
    with pytest.raises(ConfigError, match="^train.report_to: cannot begin: ZeroDivisionError"):
        told(tiny(f"train.report_to={name}", name="other"))


def broken(loop, factor):
    """Training sees other velocities than sampling does."""
    velocity = type(loop.task.model).velocity

    def asked(self, *arguments, network=None, **options):
        found = velocity(self, *arguments, network=network, **options)
        return found * factor if network is not None and torch.is_grad_enabled() else found

    return asked


def test_what_a_first_ratio_is_held_against_has_the_name_of_its_algorithm():
    """Flow-DPPO clips no ratio. Doctor has nothing to look at here, and says so."""
    config = SimpleNamespace(train=SimpleNamespace(ratio_guard="stop"))
    for objective, name in (
        (RatioClip(1e-4, 1e-4), "the clip range"),
        (DivergenceMask(), "the log ratio's spread at kl_mask_threshold"),
    ):
        loop = SimpleNamespace(task=SimpleNamespace(objective=objective), config=config)
        with pytest.raises(RunError, match=f"beyond 0.25 of {name} for 50% of .*could not look"):
            RatioGuard(loop).look({OFF: 0.5, LOG_RATIO: 1.0})


def test_a_first_ratio_that_is_not_1_stops_with_what_doctor_says(tiny, monkeypatch, capsys):
    small = "algorithm.prompts_per_rollout=2", "algorithm.group_size=2", "data.test_prompts=null"
    runs = {
        guard: Loop(tiny(TWO, *small, f"train.ratio_guard={guard}", name=guard))
        for guard in ("stop", "warn")
    }
    kind = type(runs["stop"].task.model)
    monkeypatch.setattr(kind, "velocity", broken(runs["stop"], 1.2))
    said = (
        r"^step 1: the first update's ratio is not 1: \|log ratio\| is .*, and beyond 0.25 of the "
        r"clip range for \d+% of its choices; doctor: [a-z].*; train.ratio_guard=warn goes on; no "
    )
    with pytest.raises(RunError, match=said):
        runs["stop"].run()
    assert not [*Path(runs["stop"].config.output_dir).glob("checkpoint-*")]
    monkeypatch.setattr("flowkern.train.doctor.diagnosis", lambda loop: ())
    capsys.readouterr()
    assert runs["warn"].run() == 0
    assert capsys.readouterr().err.count("the first update's ratio is not 1") == 1
    path = Path(runs["warn"].config.output_dir) / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record.get("replay/off", 0) > 0 for record in records] == [True, False] * 2
    loop = Loop(tiny(TWO, *small, "train.ratio_guard=null", name="null"))
    experience = loop.task.collect(0)
    assert not any(batch.is_replayed for batch in loop.task.batches(experience, 0))
