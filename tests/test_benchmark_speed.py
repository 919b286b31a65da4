"""The benchmark of speed says what it cannot time."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import speed  # noqa: E402


def test_a_case_that_is_not_there_is_a_line(monkeypatch, capsys, tmp_path):
    cases = [SimpleNamespace(name="flow_grpo, draw"), SimpleNamespace(name="sglang, step")]
    module = SimpleNamespace(cases=lambda device, quick: cases)
    monkeypatch.setitem(sys.modules, "bench_compat", module)
    monkeypatch.setattr(speed, "measure_bandwidths", lambda *_: {})
    monkeypatch.setattr(speed, "_print_head", lambda *_: None)
    path = tmp_path / "speed.json"
    options = ["--module", "bench_compat", "--device", "cpu", "--only", "g2rpo"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options, "--json", str(path)])
    assert speed.main() == 2
    said = capsys.readouterr().err
    assert said == "--only: no case has 'g2rpo' in its name, of flow_grpo, draw; sglang, step\n"
    assert not path.exists()
