"""What follows from validations: the best checkpoint, an early end, an alarm; saving by time."""

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from test_loop import TOY

from flowkern.train.config import ConfigError
from flowkern.train.errors import RunError
from flowkern.train.loop import Loop
from flowkern.train.validation_config import Judged
from flowkern.train.verdict import verdict

MEAN, JUDGE, FAR = "reward/mean", "reward/digits_judge", "reward/distance_to_real"


def records(*values, key=MEAN):
    return [{"step": 10 * i, key: value} for i, value in enumerate(values)]


def test_the_best_is_of_a_step_that_learned_and_of_two_alike_the_first():
    options = Judged(metric=MEAN)
    assert verdict(records(9.0), options).best is None
    assert verdict(records(9.0, 1.0, 3.0, 3.0, None), options).best["step"] == 20
    assert verdict(records(9.0, 1.0, 3.0), Judged(metric=MEAN, mode="min")).best["step"] == 10
    with pytest.raises(ConfigError, match=r"^validation.metric: got 'a', but .* has reward/mean$"):
        verdict(records(1.0), Judged(metric="a"))


@pytest.mark.parametrize("values, ends", [
    ((1.0, 2.0, 2.0), None),
    ((1.0, 2.0, 2.0, 1.9), "risen by more than 0.1 in 2 validations; the best is 2 at step 10"),
    ((1.0, 1.05, 1.1, 1.15), None),  # little by little, 0.15
    ((1.0, 1.05, 1.08), "in 2 validations; the best is 1 at step 0"),
    ((1.0, 0.0, 1.2, 0.0), None),
])  # fmt: skip
def test_patience_counts_validations_since_a_better_one(values, ends):
    found = verdict(records(*values), Judged(metric=MEAN, patience=2, min_delta=0.1)).ends
    assert found is ends is None or ends in found
    turned = [-value for value in values]
    other = verdict(records(*turned), Judged(metric=MEAN, mode="min", patience=2, min_delta=0.1))
    assert (other.ends is None) == (ends is None)


@pytest.mark.parametrize("mean, judge, far, alarm", [
    ((0.2, 0.5), (0.6, 0.55), (1, 1), None),
    ((0.2, 0.5), (0.6, 0.4), (1, 1), f"from 0.2 to 0.5 while {JUDGE} fell from 0.6 to 0.4, and"),
    ((0.2, 0.1), (0.6, 0.1), (1, 9), None),  # it gets worse, and nothing is hacked
    ((0.2, 0.5), (0.6, 0.6), (1, 3.5), f"while {FAR} rose from 1 to 3.5, and validation.collapse"),
    ((0.2, 0.3, 0.5), (0.6, 0.9, 0.75), (1, 1, 2), f"{JUDGE} fell from 0.9 to 0.75"),
])  # fmt: skip
def test_an_alarm_is_what_is_optimized_up_and_a_judge_past_its_margin(mean, judge, far, alarm):
    names = (MEAN, JUDGE, FAR)
    rows = [dict(zip(names, row, strict=True)) for row in zip(mean, judge, far, strict=True)]
    rows = [{"step": i, **row} for i, row in enumerate(rows)]
    found = verdict(rows, Judged(collapse={JUDGE: 0.1, FAR: -2})).alarm
    assert found is alarm is None or alarm in found


def test_what_cannot_be_judged_is_refused(tiny):
    for overrides, message in (
        (["validation.patience=2"], "patience: got 2, which validation.metric=null ignores"),
        (["validation.metric=reward/x"], "metric: got reward/x, expected reward/digits_clas"),
        (["validation.metric=reward/men"], r"ENTRY; did you mean reward/mean\?$"),
        (["validation.metric=rewards/mean"], r"got rewards/mean.* did you mean reward/mean\?$"),
        (["validation.metric=info/digit_judge/x"], "reward/mean, or info/REWARD/ENTRY; d"),
        (["validation.collapse={info/digits_judge: 1}"], "collapse: got info/digits_judge, exp"),
        (["validation.collapse={}"], "^validation.collapse: got {}, expected {reward/JUDGE"),
        (["validation.collapse={reward/digits_classifier: 1}"], "which is optimized; expected a j"),
        (["validation.collapse={reward/digits_judge: 0}"], "collapse: got 0 for reward/digits_ju"),
        (["validation.metric=reward/mean", "data.test_prompts=null"], "there is no validation$"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(*overrides)
    for metric in ("info/digits_judge/sure", "failed_rewards", "failed_rewards/digits_judge"):
        tiny(f"validation.metric={metric}")


@pytest.fixture
def toy(tiny, tmp_path, monkeypatch):
    """toy(values, "key=value", ...): a run whose validations say these, by iteration."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)

    def make(values, *overrides, name="run"):
        options = ("algorithm.name=toy:Recipe", "validation.steps=1", "train.steps=6")
        loop = Loop(tiny(*options, *overrides, name=name))
        loop.task.evaluate = lambda step: {MEAN: values[step][0], JUDGE: values[step][1]}
        return loop

    return make


def saved(loop):
    return sorted(int(path.name[11:]) for path in Path(loop.config.output_dir).glob("checkpoint-*"))


def test_the_best_checkpoint_stays_and_a_run_ends_early_and_says_why(toy, capsys):
    values = [(0.1, 1), (0.2, 1), (0.5, 1), (0.3, 1), (0.4, 1), (0.5, 1), (0.6, 1)]
    metric = f"validation.metric={MEAN}"
    few = "train.checkpoints_total_limit=1", "train.checkpointing_steps=2"
    whole = toy(values, metric, *few)
    whole.run()
    assert saved(whole) == [6]
    early = toy(values, metric, "validation.patience=2", *few, name="early")
    assert early.run() == 0 and early.global_step == 4
    said = capsys.readouterr().err
    assert "done: 4 steps in " in said and (
        f", ended early: {MEAN} has not risen in 2 validations; the best is 0.5 at step 2" in said
    )
    assert saved(early) == [2, 4]
    best = json.loads((Path(early.config.output_dir) / "best.json").read_text())
    assert best == {"step": 2, "metric": MEAN, "value": 0.5}
    same = "validation.patience=2", "train.resume_from_checkpoint=latest"
    again = toy(values, metric, *same, *few, name="early")
    assert again.run() == 0 and again.global_step == 4, "as it was started, it ends at once"
    again = toy(values, metric, "train.resume_from_checkpoint=latest", *few, name="early")
    assert again.run() == 0 and saved(again) == [6]


def test_the_best_is_uploaded(toy, monkeypatch):
    """Not the latest; which it is where no validation has a figure."""
    monkeypatch.setattr("flowkern.train.export.require_login", lambda *_: None)
    monkeypatch.setattr("flowkern.train.export.push", lambda *_: "there")
    pushed = []
    monkeypatch.setattr(
        "flowkern.train.export.export", lambda place, *_, **__: pushed.append(place)
    )
    hub = "train.push_to_hub=true", "train.hub_model_id=me/digits", f"validation.metric={MEAN}"
    few = "train.steps=2", "train.checkpoints_total_limit=1"
    for values, place in (((0.1, 0.5, 0.2), "run/checkpoint-1"), ((None,) * 3, "none")):
        loop = toy([(value, 1) for value in values], *hub, *few, name=place.partition("/")[0])
        assert loop.run() == 0
        assert pushed.pop() == Path(loop.config.output_dir).parent / place


def test_a_collapse_stops_the_run_with_its_state_and_status_1(toy):
    values = [(0.1, 0.9), (0.2, 0.9), (0.5, 0.9), (0.6, 0.5), (0.7, 0.1)]
    loop = toy(values, f"validation.collapse={{{JUDGE}: 0.3}}")
    said = f"^validation after step 3: {MEAN} rose from 0.1 to 0.6 while {JUDGE} fell from 0.9 to 0"
    with pytest.raises(RunError, match=f"{said}.5, .*; continue with train"):
        loop.run()
    assert saved(loop) == [2, 3]


def test_checkpoints_are_written_by_time_too(toy, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flowkern.train.cadence.time.monotonic", lambda: now[0])
    loop = toy([(0, 0)] * 7, "train.checkpointing_minutes=1.5", "train.checkpointing_steps=5")
    step = loop.step

    def slow():
        now[0] += 40
        return step()

    loop.step = slow
    loop.run()
    assert saved(loop) == [3, 5, 6], "120 s; by steps; at the end"
