"""The benchmark of the algorithms counts what is called and says what its curves say."""

import json
import re
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import algorithm_runs  # noqa: E402
import algorithm_tables  # noqa: E402
import algorithms  # noqa: E402
import claims as papers  # noqa: E402
import harness  # noqa: E402
import plot_algorithms as curves  # noqa: E402

from flowkern.rl.algorithms import PLANNERS, names  # noqa: E402
from flowkern.train.config import load_config, to_dict  # noqa: E402

CONFIGS = sorted((ROOT / "configs/digits").glob("*.yaml"))
TINY = (
    "algorithm.prompts_per_rollout=2",
    "algorithm.group_size=2",
    "algorithm.updates_per_rollout=1",
    "train.steps=1",
    "validation.num_inference_steps=2",
)


@pytest.fixture(autouse=True)
def few_images(monkeypatch, preloaded):
    """In an evaluation: the benchmark's 240 take seconds."""
    monkeypatch.setattr(algorithm_runs, "IMAGES", 12)
    monkeypatch.setattr(algorithm_runs, "QUICK_IMAGES", 12)


def run(name, seed, rewards, judges=None, **more):
    """A run whose evaluations lie 100 forward-equivalents and a second apart."""
    judges = judges or rewards
    points = [
        {
            "forward_equivalents": 100 * i,
            "seconds": float(i),
            "iterations": i,
            "sample": 40 * i,
            "train_forward": 20 * i,
            "train_gradient": 20 * i,
            "reward": reward,
            "judge": judge,
            "distance": 2.0 + 0.1 * i,
        }
        for i, (reward, judge) in enumerate(zip(rewards, judges, strict=True))
    ]
    job = {"name": name, "seed": seed, "overrides": [], "learning_rate": 3e-3}
    return job | {"curve": points, "images_per_iteration": 8, "optimizer_steps": 4} | more


def test_every_algorithm_has_a_configuration_and_a_line():
    assert [path.stem for path in CONFIGS] == names()
    assert {entry.config for entry in algorithm_runs.ENTRIES.values()} == set(names())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_differ_in_the_algorithm_alone(path):
    tree, other = (to_dict(load_config(p)) for p in (path, path.with_name("flow_grpo.yaml")))
    assert tree["algorithm"]["name"] == path.stem
    for each in (tree, other):
        for key in ("algorithm", "output_dir"):
            del each[key]
        for key in ("steps", "learning_rate", "checkpointing_steps"):
            del each["train"][key]
        del each["validation"]["steps"]
        each["reward"] = {n: one for n, one in each["reward"].items() if one["weight"]}
    assert tree == other  # and in rewards that are asked and not optimized


def test_the_runs_of_the_comparison_have_the_rates_that_tuning_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = papers.RUNS.with_stem("algorithms-tuning")
    tuned = curves.by_name(harness.recorded(path, "runs")["runs"])
    for name, entry in algorithm_runs.ENTRIES.items():
        config = load_config(algorithm_runs.CONFIGS / f"{entry.config}.yaml", entry.overrides)
        runs = tuned[entry.config]
        tried, best = sorted(one["learning_rate"] for one in runs), algorithms.best_rate(runs)
        assert config.train.learning_rate == best and best in tried[1:-1], name


def test_tuning_goes_on_while_an_edge_is_best():
    def further(*rewards):
        rates = (1.5e-3, 3e-3, 6e-3)
        runs = [
            run("awm", 1000, [0.5, reward], learning_rate=rate)
            for rate, reward in zip(rates, rewards, strict=True)
        ]
        options = algorithms.argparse.Namespace(tune=True, budget=1, quick=False)
        return [job.overrides for job in algorithms._beyond(options, runs)]

    assert further(0.6, 0.7, 0.65) == []
    assert further(0.8, 0.7, 0.65) == [("train.learning_rate=0.00075",)]
    assert further(0.6, 0.7, 0.75) == [("train.learning_rate=0.012",)]
    crashed = run("awm", 1000, [0.5, 0.9], learning_rate=6e-3, failed="step 3: the loss is nan")
    assert algorithms.best_rate([crashed, run("awm", 1000, [0.5, 0.6])]) == 3e-3


@pytest.mark.parametrize("name", ["flow_grpo", "flow_grpo_guided", "g2rpo", "awm"])
def test_calls_are_counted_as_the_plan_predicts(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    trainer = algorithm_runs._trainer(algorithm_runs.Job(name, 3, 1, TINY))
    counter = algorithm_runs.Counter(trainer)
    for _ in range(2):
        algorithm_runs.evaluate(trainer, 12)  # not counted
        counter.add(*algorithm_runs.timed(trainer.step))
    recipe, now = trainer.recipe, counter.now
    plans = [recipe.plan(trainer.task.model.sigmas, i, 3).cost() for i in range(2)]
    sampled, sites = (2 * sum(getattr(plan, k) for plan in plans) for k in ("sample", "train"))
    # In the first rollout AWM's running mean equals the weights, and is not called.
    skipped = sites / 2 if name == "awm" else 0
    assert now["sample"] == sampled * (1 if recipe.guidance_scale == 1 else 2)
    assert now["train_gradient"] == sites
    assert now["train_forward"] == sites * trainer.task.objective.calls(is_on_policy=True) - skipped
    total = now["sample"] + now["train_forward"] + 2 * now["train_gradient"]
    assert counter.total == now["forward_equivalents"] == total
    assert counter.images == plans[0].images


def test_a_job_is_the_same_again_and_ends_at_its_budget():
    job = algorithm_runs.Job(
        "flow_grpo", 3, 150, (*TINY, "algorithm.num_inference_steps=3"), points=2
    )
    first, second = job.run(), job.run()
    for found in (first, second):
        for point in found["curve"]:
            del point["seconds"]
    assert first == second
    taken = curves.column(first, "forward_equivalents")
    assert taken[0] == 0 and taken[-1] >= 150 > taken[-2]
    assert len(first["traces"]["grad_norm"]) == first["curve"][-1]["iterations"]


def test_levels_are_interpolated_and_must_be_reached_by_all():
    a, b = run("a", 0, [0.5, 0.7, 0.66, 0.9]), run("a", 1, [0.5, 0.6, 0.7, 0.72])
    assert curves.to_reach(a, 0.6) == pytest.approx(50)
    assert curves.to_reach(a, 0.7, "seconds") == pytest.approx(1)
    assert curves.to_reach(a, 0.8) == pytest.approx(200 + 100 * 0.14 / 0.24)
    assert curves.to_reach(a, 0.4) == 0
    assert curves.to_reach(b, 0.8) is None
    assert curves.mean_to_reach([a, b], 0.6) == pytest.approx(75)
    assert curves.mean_to_reach([a, b], 0.8) is None
    assert curves.common_level([a], [b]) == 0.7
    assert curves.common_level([a], [run("c", 0, [0.5, 0.5])]) is None
    assert curves.at(b, "reward", 150) == pytest.approx(0.65)


def test_learning_is_judged_by_both_margins():
    margin = algorithm_runs.MARGIN
    fine = run("a", 0, [0.5, 0.5 + margin], [0.5, 0.5 + margin])
    short = run("b", 0, [0.5, 0.49 + margin], [0.5, 0.9])
    hacked = run("c", 0, [0.5, 0.8], [0.5, 0.5 + 0.79 * 0.3])
    crashed = run("d", 1, [0.5, 0.9], failed="step 3: the loss is nan")
    bad = algorithms.failures([fine, short, hacked, crashed])
    assert [text.split(",")[0] for text in bad] == ["b", "c", "d"]
    assert "+0.140" in bad[0] and "nan" in bad[2]


def test_what_a_headline_is_held_to_follows_from_the_curves():
    slow, fast, wide, far = (
        [run("a", seed, curve) for seed, curve in enumerate(curves)]
        for curves in (
            [[0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.82]],
            [[0.5, 0.8, 0.9, 0.9], [0.5, 0.8, 0.9, 0.92]],
            [[0.5, 0.7, 0.7, 0.75], [0.5, 0.9, 0.9, 0.96]],
            [[0.5, 0.55], [0.5, 0.56]],
        )
    )
    text, verdict = papers.faster(fast, slow, None)
    assert (
        text == "to .80: 2.9 times by count (0k against 0k), 2.9 in time" and verdict == papers.YES
    )
    assert papers.faster(fast, slow, 3.2)[1] == papers.YES  # 1.9 beyond nothing, of 2.2
    assert papers.faster(fast, slow, 4.0)[1] == papers.PART
    assert papers.faster(slow, fast, 4.0)[1] == papers.NO
    assert papers.faster(fast, far, 4.0)[1] == papers.UNTOLD
    text, verdict = papers.higher(fast, slow, None)
    assert text == "reward .910 (.900 to .920) against .810 (.800 to .820)"
    assert verdict == papers.YES
    assert papers.higher(wide, slow, None)[1] == papers.MEAN
    assert papers.higher(slow, fast, None)[1] == papers.NO == papers.as_high(slow, fast, None)[1]
    assert papers.as_high(wide, fast, None)[1] == papers.as_high(slow, wide, None)[1] == papers.YES


def test_less_hacking_is_less_distance_at_no_less_reward():
    def drifted(reward, distances):
        runs = [run("a", seed, [0.5, reward], [0.5, reward]) for seed in range(len(distances))]
        for one, distance in zip(runs, distances, strict=True):
            one["curve"][0]["distance"], one["curve"][-1]["distance"] = 2.0, distance
        return runs

    near, far, both = (drifted(0.8, ends) for ends in ([1.9, 2.0], [2.2, 2.3], [1.8, 2.25]))
    assert papers.holds(near, far, None)[1] == papers.YES
    assert papers.holds(both, far, None)[1] == papers.MEAN
    assert papers.holds(far, near, None)[1] == papers.NO
    assert papers.holds(drifted(0.7, [1.9, 2.0]), far, None)[1] == papers.UNTOLD
    assert papers.gains(near, None)[1] == papers.YES
    assert papers.gains(far, None)[1] == papers.NO
    hacked = [run("a", 0, [0.5, 0.8], [0.5, 0.7])]
    assert papers.gains(hacked, None)[1] == papers.NO
    assert papers.gains(hacked, True)[1] == papers.UNASKED


def test_the_page_of_claims_has_the_figures_of_the_recorded_runs():
    recorded = papers.recorded()
    text = papers.page(recorded)
    assert papers.PAGE.read_text() == text, "make it again: python benchmarks/claims.py"
    said = dict(recorded.verdicts)
    assert {*names(), *PLANNERS} - {"agentflow_verl"} <= said.keys()
    assert {algorithm_runs.ENTRIES[name].label for name in names()} <= set(
        re.findall(r"(?m)^\| \[?([^|\]]+?)(?:\]\(\S+\))? \|", text)
    )


def test_what_was_not_run_yet_says_so():
    recorded = papers.recorded()
    runs = [one for one in recorded.result["runs"] if one["name"] != "awm"]
    found = papers.Claims(recorded.result | {"runs": runs, "iterations": []}, recorded.planners)
    for line in (
        found.runs(papers.faster, "awm", "flow_grpo", 24),
        found.runs(papers.faster, "tempflow_grpo", "awm", 24),
        found.cheaper("mixgrpo", "dance_grpo", 0.5),
    ):
        assert line.endswith(papers.LATER)
    assert found.summary() == f"3 {papers.LATER}"
    found.verdicts = [("a", papers.NO), ("b", papers.YES), ("c", papers.YES)]
    assert found.summary() == "2 reproduce, 1 does not"
    found.verdicts = [("a", papers.NO), ("b", papers.YES), ("c", papers.NO)]
    assert found.summary() == "1 reproduces, 2 do not"


def test_a_file_that_is_no_result_is_refused_in_a_line(tmp_path):
    bad = {"none.json": None, "text.json": "{", "list.json": "[]", "other.json": '{"gaussian": 1}'}
    for name, text in bad.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(SystemExit, match=name):
            harness.recorded(tmp_path / name, "runs")
    (tmp_path / "one.json").write_text('{"runs": []}')
    assert harness.recorded(tmp_path / "one.json", "runs") == {"runs": []}


def test_images_are_counted_as_flowkern_cost_does(capsys):
    from flowkern.cli import main

    assert main(["cost", "mixgrpo", "awm"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "mean of" in line]
    for name, row in zip(("mixgrpo", "awm"), rows, strict=True):
        training, sampled, trained, images = (float(row[i]) for i in (-5, -3, -2, -1))
        expected = (sampled + trained + 2 * training) / images
        assert papers.per_image(name, {}, False) == pytest.approx(expected, rel=2e-3)


def test_the_docs_have_the_figures_of_the_recorded_runs():
    """docs/digits.md: every algorithm's line."""
    folder = ROOT / "benchmarks/results/intel-xeon-processor-2-threads"
    result = json.loads((folder / "algorithms.json").read_text())
    text = (ROOT / "docs/digits.md").read_text()
    table = text.split("| algorithm |")[1].split("\n\n")[0]
    lines = (line.strip("| ").split(" | ") for line in table.splitlines() if "| ---" not in line)
    said = {cells[0]: cells[1:] for cells in lines}
    for name, runs in curves.by_name(result["runs"]).items():
        end, rewards = algorithm_tables._end(runs), [one["curve"][-1]["reward"] for one in runs]
        numbers = [end["reward"], min(rewards), max(rewards), end["judge"]]
        reward, low, high, judge = (f"{number:.3f}".removeprefix("0") for number in numbers)
        levels = [algorithm_tables._reached(runs, level).split(",")[0] for level in (0.7, 0.8)]
        rate = f"{runs[0]['learning_rate']:.1e}".replace(".0e-0", "e-").replace("e-0", "e-")
        expected = [rate, f"{reward} ({low} to {high})", judge, f"{end['distance']:.2f}", *levels]
        if name != "flow_grpo_guided":  # which is told in words
            assert said[result["labels"][name]] == expected


def test_a_result_is_drawn_and_printed(tmp_path, capsys):
    machine = {"processor": "cpu", "torch": "2", "commit": "abc", "flowkern": "0", "utc": "now"}
    result = {
        "machine": machine | {"dirty": False},
        "labels": {"a": "A"},
        "settings": {"seeds": [0, 1], "processes": 2},
        "seconds": 1.0,
        "runs": [run("a", s, [0.5, 0.8]) for s in range(2)] + [run("b", 0, [0.5, 0.4])],
    }
    result["runs"].append({"name": "c", "seed": 0, "overrides": [], "curve": [], "failed": "no"})
    algorithm_tables.report(result, tmp_path / "algorithms.json")
    assert (tmp_path / "algorithms.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "0.50 to 0.800" in printed and "0.50 to 0.400" in printed


def test_every_algorithm_has_a_line_of_its_own_look():
    places = range(len(algorithm_runs.ENTRIES))
    assert len({curves.look(place) for place in places}) == len(places)
