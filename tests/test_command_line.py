"""What the command says before anything heavy is imported: help, versions, configurations."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml")
from test_architecture import HEAVY

from flowkern import cli
from flowkern.cli import main
from flowkern.train.errors import describe

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs/digits/flow_grpo.yaml")
AGENT = str(ROOT / "configs/agent/demo.yaml")

# Arguments, exit status, what the one line on stderr holds (or, with status 0, stdout).
SAID = [
    (["--help"], 0, "usage: flowkern"),
    (["train", "--help"], 0, "key.path=value"),
    (["--version"], 0, "flowkern "),
    (["train"], 2, "train: expected a CONFIG.yaml"),
    (["trian", CONFIG], 2, "got 'trian', expected one of .*did you mean 'train'"),
    (["train", "nope.yaml"], 2, "nope.yaml: No such file"),
    (["train", CONFIG, "nope.yaml"], 2, "nope.yaml: No such file"),
    (["train", str(ROOT)], 2, "Is a directory"),
    (["train", CONFIG, "--train.steps=0"], 2, "train.steps: got 0, expected a number above 0"),
    (["train", CONFIG, "--train.steps", "0"], 2, "train.steps: got 0, expected a number above 0"),
    (["train", CONFIG, "--train.steps"], 2, "--train.steps: expected a value"),
    (["train", CONFIG, "lr=3"], 2, "lr: unknown key; did you mean 'train.learning_rate'"),
    (["train", CONFIG, "algorithm.name=mixgpo"], 2, "algorithm.name: .*did you mean 'mixgrpo'"),
    (["train", CONFIG, "algorithm.name=no_such:Recipe"], 2, "there is no module no_such"),
    (["train", CONFIG, "reward.digit_judge={}"], 2, "reward.digit_judge: .*mean 'digits_judge'"),
    (["train", CONFIG, "reward.weights={}"], 2, "reward.weights: is not how .* {weight: 1.0}"),
    (["train", AGENT, "agent.max_turn=3"], 2, "agent.max_turn: .*mean 'agent.max_turns'"),
    (["train", AGENT, "model.height=3"], 2, "model.height: unknown key"),
    (["train", AGENT, "reward={exat: {}}"], 2, "reward.exat: .*mean 'exact'"),
    (["train", AGENT, "agent.engine.kind=servr"], 2, "agent.engine.kind: .*mean 'server'"),
    (["train", AGENT, "train.prompts_per_block=1"], 2, "train.prompts_per_block: got 1, but"),
    (
        ["train", AGENT, "algorithm.dual_clip=1.1"],
        2,
        "algorithm.dual_clip: got 1.1, expected .*1.3",
    ),
    (["train", AGENT, "algorithm.guidance_scale=2"], 2, "algorithm.guidance_scale: unknown key"),
    (
        ["train", AGENT, "algorithm={name: agentflow_verl, group_by: token}"],
        2,
        "algorithm.group_by: got 'token', expected one of trajectory, row",
    ),
    (["demo", "agnt"], 2, "demo: got 'agnt', expected agent"),
    (["cost", "agentflow"], 2, "agentflow: is not counted: .*turns"),
    (["cost", "--config", AGENT], 2, "agentflow: is not counted"),
    (["sample", "x"], 2, "one of the arguments --prompt --prompts is required"),
    (
        ["sample", "x", "--prompt", "p", "--num-images", "1001"],
        2,
        "--num-images: .* 1 to 1000",
    ),
]


def test_help_and_mistakes_cost_no_torch_and_one_line():
    code = f"""
import contextlib, io, sys
from flowkern.cli import main
for arguments in {[arguments for arguments, _, _ in SAID]!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    print(repr((status, out.getvalue(), err.getvalue())))
import flowkern.rl.algorithms as algorithms
for name in (*algorithms.names(), *algorithms.PLANNERS):
    algorithms.recipe(name)()
heavy = [name for name in ("torch", "numpy", "diffusers") if name in sys.modules]
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for (arguments, status, message), line in zip(SAID, run.stdout.splitlines(), strict=True):
        got, out, err = eval(line)
        assert got == status, (arguments, err)
        assert re.search(message, err if status else out), (arguments, out, err)
        assert not status or (err.startswith("flowkern: ") and err.count("\n") == 1), err


def test_torch_alone_is_enough_to_count_also_an_algorithm_of_the_working_directory(tmp_path):
    """The package loads nothing else, and the papers' numbers need neither rich nor what the
    trainer does. The installed command does not begin with the working directory on Python's path,
    as `python -m` does.
    """
    (tmp_path / "mine.py").write_text(
        "import sibling\nfrom flowkern.rl.algorithms.awm import AWM as Mine\n"
    )
    (tmp_path / "sibling.py").write_text("")
    (tmp_path / "broken.py").write_text("import no_such_thing\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    code = f"""
import sys
sys.path[:] = [p for p in sys.path if p] + [{str(ROOT)!r}]
import flowkern
assert not {{"torch", "numpy", "triton"}} & sys.modules.keys(), "it costs them when they are used"
[getattr(flowkern, name) for name in flowkern.__all__]
heavy = [name for name in {sorted(HEAVY)!r} if name in sys.modules]
assert not heavy, heavy
sys.modules.update(dict.fromkeys({sorted(HEAVY)!r}))
sys.stdout.isatty = lambda: True
from flowkern.cli import main
assert main(["cost", "mine:Mine", "tempflow_grpo"]) == 0
for name in ("mine:Min", "broken:Recipe", "failing:Recipe"):
    assert main(["cost", name]) == 2
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *_, row = run.stdout.splitlines()
    assert row.split() == "tempflow_grpo 1116 1116 0% 36 216 2232 126 216".split()
    said = run.stderr.splitlines()
    assert said[0].endswith("mine has no 'Min'; did you mean 'Mine'?")
    assert said[1].endswith("broken imports no_such_thing, which is not there")
    assert said[2].endswith("importing failing raised ZeroDivisionError: division by zero")
    assert "pip install" not in run.stderr, "nothing of this package is missing"


def test_the_lobbies_are_whole():
    import flowkern
    from flowkern import rl, rollout

    for lobby in (flowkern, rl, rollout):
        assert set(lobby.__all__) == set(lobby._HOMES)
        for name in lobby.__all__:
            assert getattr(lobby, name) is not None
        tree = ast.parse(Path(lobby.__file__).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        told = {(n.name, node.module) for node in imports for n in node.names} - {
            ("TYPE_CHECKING", "typing")
        }
        homes = {(n, h.removesuffix(f".{n}")) for n, h in lobby._HOMES.items() if n == "schedules"}
        homes |= {(n, h) for n, h in lobby._HOMES.items() if n != "schedules"}
        assert told - {("lazily", "flowkern.lookup")} == homes
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = lobby.nothing


@pytest.mark.long(10)
def test_of_several_processes_one_says_what_is_wrong():
    """And the launcher says with which status it ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, ROOT / "scripts/train.py", CONFIG, "train.steps=0"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stderr
    (line,) = [line for line in said.splitlines() if line.startswith("flowkern:")]
    assert line == "flowkern: train.steps: got 0, expected a number above 0"
    assert re.search(r"rank\s+: 0 .*\n\s+exitcode\s+: 2 ", said)


def test_what_one_process_alone_finds_is_said(monkeypatch, capsys):
    monkeypatch.setattr("flowkern.cli.errors.PATIENCE", 0)
    for rank, world, said in ((0, 2, ""), (1, 2, "process 1: "), (1, 1, "")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert main(["train", CONFIG, "train.steps=0"]) == 2
        assert (
            capsys.readouterr().err
            == f"flowkern: {said}train.steps: got 0, expected a number above 0\n"
        )
    gone = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:7330. GLHF!")
    assert "another process has ended" in describe(gone)


@pytest.mark.parametrize(
    "error, said",
    [
        (
            PermissionError(13, "Permission denied", "run/metrics.jsonl"),
            "'run/metrics.jsonl': Per",
        ),
        (OSError(28, "No space left on device", "a", None, "b"), "'b': No space left on device"),
        (OSError("page.html cannot be written:\nit is full"), "page.html cannot be written: it is"),
    ],
)
def test_what_the_system_refuses_is_said_by_its_file(error, said, monkeypatch, capsys):
    def refuse(options):
        raise error

    monkeypatch.setattr(cli.report, "run", refuse)
    assert cli.main(["report", "run"]) == 1
    assert capsys.readouterr().err.startswith(f"flowkern: {said}")
