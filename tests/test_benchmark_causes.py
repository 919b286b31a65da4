"""The experiments about causes are runs of the benchmark that differ in what they name."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import algorithm_runs  # noqa: E402
import causes  # noqa: E402

from flowkern.train.config import load_config  # noqa: E402

NAMES = [(table, name) for table in causes.TABLES for name in causes.experiments(table)]


def test_every_experiment_is_a_configuration(monkeypatch):
    monkeypatch.chdir(ROOT)
    for table, name in NAMES:
        job = causes.Trial(name, 0, 1, causes.experiments(table)[name].overrides, table=table)
        path = algorithm_runs.CONFIGS / f"{job.entry.config}.yaml"
        load_config(path, [*job.entry.overrides, *job.overrides, "seed=0"])


def test_a_fall_is_from_the_best_evaluation_until_then():
    curve = [{"reward": reward} for reward in (0.5, 0.8, 0.6, 0.7, 0.9)]
    assert causes.fall({"curve": curve}) == pytest.approx(0.2)
    assert causes.fall({"curve": curve[:2]}) == 0
