"""What `make gpu` rests on: limits, the first calls, rotating timings, leaving after a fault."""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts" / "gpu")]
sys.path.append(str(ROOT / "tests" / "ops"))
import calls  # noqa: E402
import device_time  # noqa: E402
import launch  # noqa: E402
import part_a  # noqa: E402
import part_d  # noqa: E402
import smoke  # noqa: E402
import tiles  # noqa: E402
import train  # noqa: E402
import wheels  # noqa: E402
from steps import Steps  # noqa: E402

from flowkern.models import quantize  # noqa: E402
from flowkern.train.config import load_config  # noqa: E402

CPU = torch.device("cpu")


def test_a_step_that_is_cut_off_leaves_what_it_had(tmp_path):
    """And nothing of what it started; the next one runs."""
    child = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    steps = Steps("X", 60, tmp_path)
    assert not steps.run("hangs", 2, [sys.executable, "-c", command])
    assert steps.run("next", 30, [sys.executable, "-c", "print('done')"])
    assert not steps.run("fails", 30, [sys.executable, "-c", "raise SystemExit(3)"])
    (pid,) = map(int, (tmp_path / "hangs.log").read_text().split())
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end_of(pid)
    assert (tmp_path / "next.log").read_text() == "done\n"
    found = [(s["step"], s["result"]) for s in json.loads((tmp_path / "summary.json").read_text())]
    assert found == [("hangs", "out of time"), ("next", "passed"), ("fails", "failed (3)")]
    assert not steps.is_good


def _wait_for_the_end_of(pid):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        os.kill(pid, 0)


def test_no_step_outlasts_its_part(tmp_path):
    steps, begin = Steps("X", 3, tmp_path), time.monotonic()
    assert not steps.run("long", 60, [sys.executable, "-c", "import signal; signal.pause()"])
    assert not steps.run("late", 60, [sys.executable, "-c", ""])
    assert time.monotonic() - begin < 30
    assert [s["result"] for s in steps.summary] == ["out of time", "no time left"]


def test_a_part_leaves_no_step_behind(tmp_path):
    steps = Steps("X", 60, tmp_path)
    step = steps.start("build", 50, [sys.executable, "-c", "import signal; signal.pause()"])
    steps.close()
    assert step.process.returncode < 0


@pytest.fixture(scope="module")
def contenders():
    pytest.importorskip("diffusers")
    return importlib.import_module("contenders")


class NoGradients:
    def zero_grad(self):
        pass


def test_out_of_memory_halves_the_batch_and_goes_on(contenders, monkeypatch):
    bench = object.__new__(contenders.Contender)
    bench.batch, bench.plain, bench.way = 16, SimpleNamespace(), contenders.WAYS["a"]
    bench.trainer = SimpleNamespace(optimizer=NoGradients())
    monkeypatch.setattr(bench, "_set_batch", lambda: None)

    def rollout():
        if bench.batch > 4:
            raise torch.cuda.OutOfMemoryError("too much")
        return {"max_batch": bench.batch}

    monkeypatch.setattr(bench, "_rollout", rollout)
    assert bench.rollout() == {"max_batch": 4}


def test_a_kernel_that_failed_its_first_call_is_left_out_of_the_timings(tmp_path):
    good = {"op": "sde_step", "backend": "triton", "ok": True}
    lines = [good, good | {"ok": False}, good | {"op": "noise", "backend": "native", "ok": False}]
    (tmp_path / "smoke.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert part_a.left_out(Steps("A", 1, tmp_path)) == ["noise:native", "sde_step:triton"]


@pytest.mark.parametrize("call", calls.take(calls.FEW), ids=str)
def test_every_first_call_can_be_made(call, backend):
    """On the CPU: a verb that refuses what it is given there would refuse it on a device."""
    assert smoke._here(str(call), backend, "cpu") == 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/digits").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_demos_of_part_b_are_configurations(path):
    for more in (train.FIRST, train.FURTHER):
        config = load_config(path, [*train.SMALL, *more, "output_dir=x"])
        assert config.train.steps % config.algorithm.updates_per_rollout == 0


def test_the_first_call_knows_wrong_from_right():
    right = torch.linspace(-1, 1, 100).view(2, 50)
    assert smoke._error(right + 1e-4, right) < 1 < smoke._error(right + 2e-3, right)
    assert smoke._error(right * float("nan"), right) != smoke._error(right, right) == 0
    for other in (right[:1], right.double(), right > 0):
        assert smoke._error(other, right) == float("inf")
    flags = right > 0
    assert smoke._error(flags, flags) == 0 and smoke._error(~flags, flags) == float("inf")
    ops = {call.op for call in calls.CALLS}  # as benchmarks/speed.py names them
    assert ops == {"sde_step", "guidance", "policy_loss", "matching_loss", "noise"}
    assert set(tiles.TIMED) - {"sde_log_prob, forward"} <= calls.BY_NAME.keys()
    assert {*launch.VERBS, *smoke.REHEARSED} <= calls.BY_NAME.keys()


def test_timings_rotate_over_copies_and_keep_every_output():
    calls, copies = [], 3

    def call(copy):
        calls.append(copy)
        return (torch.full((4,), float(copy)),)

    runs = [lambda copy=copy: call(copy) for copy in range(copies)]
    graph = device_time.Graph(runs, CPU)
    graph.replay()
    assert calls[-copies:] == [*range(copies)]
    assert len({r[0].data_ptr() for r in graph.results}) == copies
    found = device_time.measure({"a": runs, "waits": runs}, CPU, 0.0, waiting=["waits"])
    assert found["a"]["copies"] == copies and found["a"]["ms_p50"] > 0 < found["a"]["host_ms_p50"]
    assert "not_captured" in found["waits"] and "ms_p50" not in found["waits"]


@pytest.mark.parametrize(
    "moved, expected", [(3 * 2**21, 34), (3 * 2**20, 64), (3 * 2**26, 2), (2**31, 2)]
)
def test_copies_are_four_times_the_cache_together(moved, expected, monkeypatch):
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert device_time.copies(moved, torch.device("cuda")) == expected


def test_carried_wheels_are_pinned_and_unpacked(tmp_path):
    names = [requirement.split("==")[0] for requirement in wheels.wanted()]
    assert names == list(wheels.NAMES) and all("==" in each for each in wheels.wanted())
    assert wheels.unpack(tmp_path / "wheels", tmp_path / "site") == []
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1-py3-none-any.whl", "w") as archive:
        archive.writestr("carried/__init__.py", "found = True")
    (site,) = wheels.unpack(tmp_path / "wheels", tmp_path / "site")
    assert (site / "carried" / "__init__.py").read_text() == "found = True"


def test_carried_wheels_need_nothing_that_is_not_there():
    """importlib_metadata came to need lazy-importer, which hardly a machine has."""
    for name in (name for name in wheels.NAMES if name != "setuptools"):
        pytest.importorskip(name.replace("-", "_"))
        needed = {
            re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
            for requirement in importlib.metadata.requires(name) or []
            if "extra ==" not in requirement
        }
        carried = {each.replace("_", "-") for each in wheels.NAMES}
        assert needed <= carried | wheels.PRESENT, name


# A torch that has what the fixture asks for and takes no seconds to import.
FAULTY = """
import importlib.util, sys, types
lost = []

def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")

torch = sys.modules["torch"] = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=synchronize, lost=lost)
spec = importlib.util.spec_from_file_location("shared", {path!r})
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
leave_after_a_fault = shared.leave_after_a_fault
"""
TESTS = """
import pytest, torch
pytestmark = pytest.mark.gpu

def test_faults(): torch.cuda.lost.append(True)
def test_comes_after(): assert not torch.cuda.lost
"""


def test_a_worker_leaves_after_a_fault_and_the_next_test_has_a_new_one(tmp_path):
    if importlib.util.find_spec("xdist") is None:
        pytest.skip("needs pytest-xdist")
    (tmp_path / "conftest.py").write_text(FAULTY.format(path=str(ROOT / "tests" / "conftest.py")))
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    command = [sys.executable, "-m", "pytest", "-v", "-n", "1", "-p", "no:cacheprovider"]
    command += ["-p", "no:hypothesispytest"]  # whose import takes seconds
    run = subprocess.run([*command, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert "crashed while running 'test_it.py::test_faults'" in run.stdout, run.stdout
    assert "PASSED test_it.py::test_comes_after" in run.stdout, run.stdout


def test_the_large_model_is_the_published_one():
    pytest.importorskip("diffusers")
    large_model = pytest.importorskip("large_model")
    with torch.device("meta"):
        network = large_model.SD3Transformer2DModel(**large_model.MEDIUM.transformer)
    assert round(sum(p.numel() for p in network.parameters()) / 1e9, 3) == 2.243


@pytest.fixture(scope="module")
def networks():
    pytest.importorskip("diffusers")
    return importlib.import_module("network_models")


@pytest.mark.parametrize("family, billions", [("flux", 11.901), ("wan", 1.419)])
def test_the_larger_networks_are_the_published_ones(networks, family, billions):
    network = networks.Network(family, torch.device("meta"), has_lora=False).network
    assert round(sum(p.numel() for p in network.parameters()) / 1e9, 3) == billions


def test_a_float8_layer_is_the_linear_one_and_has_its_gradient():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 8, 64, dtype=torch.bfloat16) * torch.logspace(-2, 2, 8)[:, None]
    found = []
    for layer in (linear, quantize.Float8Linear(linear)):
        given = x.bfloat16().requires_grad_(True)
        out = layer(given)
        out.float().square().sum().backward()
        found.append((out.detach().float(), given.grad.float()))
    for right, close in zip(*found, strict=True):
        assert 0 < (close - right).norm() < 0.06 * right.norm()
        each = ((close - right).norm(dim=-1) / right.norm(dim=-1)).max()
        assert each < 0.08  # a row's scale is its own: small ones lose no more


def test_a_float8_base_is_close_to_the_network_and_learns(networks, monkeypatch):
    monkeypatch.setattr(networks, "IS_REHEARSAL", True)
    model = networks.Network("sd3", CPU)
    right, gradient = model.learn(1), model.gradient()
    count = quantize.quantize(model.blocks)
    names = [n for n, m in model.network.named_modules() if isinstance(m, quantize.Float8Linear)]
    assert len(names) == count and not [n for n in names if "norm" in n or "lora" in n]
    # Of a block: 8 of joint attention, 4 of its own attention (3 blocks), 4 of two feed-forwards;
    # the last has neither a second output nor a second feed-forward.
    assert count == 6 * 12 + 3 * 4 - 3
    found, learned = model.learn(1), model.gradient()
    assert 0 < (found - right).float().norm() < 0.1 * right.float().norm()
    assert 0 < (learned - gradient).norm() < 0.3 * gradient.norm()


@pytest.mark.parametrize("said", [part_d.FAULT, "out of memory"])
def test_a_network_that_faults_is_run_again_apart(said, tmp_path):
    found = {"one": {"eager": 1.0}, "two, larger": {"error": f"CUDA error: an {said} was met"}}
    (tmp_path / "network.json").write_text(json.dumps(found))
    ran = []
    part_d.run(SimpleNamespace(results=tmp_path, run=lambda *step: ran.append(step)))
    again = ran[1:]
    assert len(again) == (said == part_d.FAULT)
    for name, _, command, env in again:
        assert name == "fault-two" and command[command.index("--only") + 1] == "two,larger"
        assert env["FLOWKERN_RESULTS"] != str(tmp_path)


def test_cases_take_turns_as_they_come_to_be_ready(tmp_path, capsys):
    pytest.importorskip("diffusers")
    network = importlib.import_module("network")
    context, results = multiprocessing.get_context("fork"), network.Results(tmp_path)
    case = network.CASES[0]

    def prepares(results, turn, name):
        results.note(name, "prepared", True)

    def takes(results, turn, name):
        turn()
        results.note(name, "taken", True)

    def hangs(results, turn):
        turn()
        signal.pause()

    first = network.Job("first", prepares, (tmp_path, "first"))
    after = [
        network.Job("hangs", hangs, (tmp_path,), replace(case, limit=0.2), needs=[first]),
        network.Job("faulty", lambda results, turn: 1 / 0, (tmp_path,), case),
        network.Job("last", takes, (tmp_path, "last"), case, needs=[first]),
    ]
    end = time.monotonic() + 20
    while network.advance([first], after, results, context) and time.monotonic() < end:
        time.sleep(0.01)
    found = results.read()
    assert found["first"] == {"prepared": True} and found["last"] == {"taken": True}
    assert found["hangs"]["error"].startswith("out of time")
    assert found["faulty"]["error"].startswith("ZeroDivisionError")


def test_contenders_are_timed_alone_and_one_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """What is not ready is stopped while another is timed, and goes on after it."""
    pytest.importorskip("diffusers")
    train_step = importlib.import_module("train_step")
    said = {"rows": {"learning": 1, "sampling": 2}, "seconds": 2.0, "phases": {}, "images_per_s": 1}
    said |= {"peak_memory_gb": None, "images": 8}
    log = []

    class Player:
        def __init__(self, name, answers):
            self.name, self.turns, self.is_ready, self.error = name, 0, False, None
            self.answers, self.line = answers, None

        def ask(self, is_first):
            pass

        def hear(self, patience):
            answer = self.answers.pop(0) if self.answers else None
            self.error = answer and answer.get("error")
            return answer

        def signal(self, number):
            log.append((self.name, number))

    ready = {"ready": 1.0}
    players = [
        Player("a", [ready, said, said]),
        Player("c", [ready, said, {"error": "CUDA error"}]),
        Player("d", [None] * 4 + [ready, said, said | {"seconds": 1.0}]),
    ]
    match = object.__new__(train_step.Match)
    options = {
        "device": "cuda",
        "limit": float("inf"),
        "rollouts": 1,
        "contenders": ["a", "c", "d"],
    }
    match.options, match.players = SimpleNamespace(**options), players
    match.folder, match.path = tmp_path, tmp_path / "e2e.json"
    match.result = {"tflop_of_a_row": {"forward": 1.0, "both": 2.0}, "errors": {}, "rollouts": []}
    match.result |= {"machine": {"gpu": "NVIDIA H100 80GB"}, "ready_after_s": {}}
    monkeypatch.setattr(train_step, "wait", lambda *given, **more: None)
    monkeypatch.setattr(match, "may_begin", lambda wanted: True)
    match.run()
    found = json.loads(match.path.read_text())
    order = [(row["way"], row["is_warm_up"]) for row in found["rollouts"]]
    assert order == [("a", True), ("c", True), ("a", False), ("d", True), ("d", False)]
    assert found["errors"] == {"c": "CUDA error"} and found["ratios"] == {}
    assert found["counted"] == {"c to a": 1, "d to c": 1}
    stopped = [each for each in log if each[0] == "d" and len(each) == 2]
    assert stopped == [("d", signal.SIGSTOP), ("d", signal.SIGCONT)] * 2
    row = found["rollouts"][0]
    assert row["model_tflop"] == 4 and row["tflops"] == 2 and row["utilization"] == 2 / 989
