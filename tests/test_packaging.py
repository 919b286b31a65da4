"""What is handed on: the source distribution is whole, and a wheel brings the demo with it."""

import fcntl
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
PARTS = ("csrc", "flowkern", "configs", "tests", "assets", "setup.py", "pyproject.toml")


def setup(*command, cwd=ROOT):
    """A command of setup.py that compiles nothing."""
    environment = os.environ | {"FLOWKERN_BUILD": "none"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *map(str, command)],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Unpacked; made without the egg-info of an earlier build, whose list would be taken over."""
    folder = tmp_path_factory.mktemp("sdist")
    with open(ROOT / "pyproject.toml") as lock:  # it is gathered in a folder of the tree
        fcntl.flock(lock, fcntl.LOCK_EX)
        setup("egg_info", "--egg-base", folder, "sdist", "--formats", "tar", "--dist-dir", folder)
    (archive,) = folder.glob("*.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.stem


def test_the_sdist_holds_every_tracked_file(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z", *PARTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    assert len(tracked) > 200
    assert [name for name in tracked if not (sdist / name).is_file()] == []


def test_the_sdist_holds_what_every_kernel_is_built_from(sdist):
    """With nothing but it: the sources that setup.py finds, and what they include."""
    left = [*sdist.glob("csrc/*.cpp"), *sdist.glob("csrc/*/*_cpu.cpp"), *sdist.glob("csrc/*/*.cu")]
    assert len(left) >= 9
    seen = set()
    while left:
        path = left.pop().resolve()
        if path not in seen:
            seen.add(path)
            names = re.findall(r'^#include "([^"]+)"', path.read_text(), flags=re.MULTILINE)
            left += [path.parent / name for name in names]
    assert all(path.is_relative_to(sdist.resolve()) for path in seen)


def test_cuda_kernels_are_built_of_what_is_handed_on_where_there_is_nvcc(sdist, monkeypatch):
    monkeypatch.setenv("FLOWKERN_BUILD", "auto")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("os.path.exists", lambda path: False)  # no device
    for root, is_built in ((sdist, True), (ROOT, False)):
        monkeypatch.setattr("shutil.which", lambda name, path=None: None)
        wants_cuda = runpy.run_path(str(root / "setup.py"))["wants_cuda"]
        assert not wants_cuda()
        found = {"nvcc": "/bin/nvcc"}
        monkeypatch.setattr("shutil.which", lambda name, path=None, found=found: found.get(name))
        assert wants_cuda() == is_built


@pytest.fixture(scope="module")
def site(sdist, tmp_path_factory):
    """What a wheel of the sdist puts on Python's path."""
    folder = tmp_path_factory.mktemp("wheel")
    setup(
        "build",
        "--build-base",
        folder / "build",
        "bdist_wheel",
        "--dist-dir",
        folder,
        cwd=sdist,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_is_typed_and_has_the_configurations(site):
    assert (site / "flowkern" / "py.typed").is_file()
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert (site / "flowkern/demo_data" / path.relative_to(ROOT)).is_file(), path


@pytest.mark.long(20)
def test_the_demo_runs_from_a_wheel_in_an_empty_folder_until_ctrl_c(site, tmp_path):
    """It saves the step that is interrupted, and `sample` draws from it."""
    for name in ("accelerate", "diffusers", "matplotlib", "peft", "transformers"):
        pytest.importorskip(name)
    few, prompts = tmp_path / "few.jsonl", site / "flowkern/demo_data/assets/digits-prompts"
    few.write_text("".join((prompts / "train.jsonl").open().readlines()[:4]))
    small = ["train.steps=100000", "algorithm.updates_per_rollout=1", "validation.num_prompts=2"]
    small += ["algorithm.num_inference_steps=3", "validation.num_inference_steps=2"]
    small += [f"data.train_prompts={few}"]
    small += ["algorithm.prompts_per_rollout=2", "algorithm.group_size=2", "output_dir=runs/demo"]
    small += ["train.checkpointing_steps=100000", "validation.steps=100000"]
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    said, run = tmp_path / "said.txt", tmp_path / "runs/demo"
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 300
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "flowkern", "demo", *small],
            env=environment | {"ACCELERATE_USE_CPU": "true"}, cwd=tmp_path, stderr=file,
        )  # fmt: skip
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()  # its messages end with it
            pytest.fail(said.read_text())
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 128 + signal.SIGINT
    assert str(site) in (run / "config.yaml").read_text()
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert f"stopped after step {last}" in said.read_text()
    assert "Traceback" not in said.read_text()
    (saved,) = run.glob("checkpoint-*")
    assert saved.name == f"checkpoint-{last}"
    assert torch.load(saved / "state.pt", weights_only=True)["step"] == last

    from flowkern.cli import main

    options = ["--prompt", "the digit 3", "--num-inference-steps", "2"]
    for count, name in ((1, "one.png"), (3, "three.png")):
        output = tmp_path / name
        arguments = ["sample", str(run), *options, "--num-images", str(count)]
        assert main([*arguments, "--output", str(output)]) == 0
        assert output.read_bytes()[:4] == b"\x89PNG"


def test_versions_have_tested_bounds_and_what_is_required_is_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert "torch>=2.11,<2.14" in project["dependencies"]
    assert extras["triton"] == ["triton>=3.6,<3.10"]
    sources = "".join(path.read_text() for path in (ROOT / "flowkern").rglob("*.py"))
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    required = {requirement.split(">")[0] for requirement in extras["train"]}
    for name in required - {"transformers"}:  # of pipelines, which load its encoders by name
        assert re.search(rf"\b(import|from) {modules.get(name, name)}\b", sources), name


def test_pre_commit_formats_as_make_lint_does():
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff-pre-commit\n    rev: v(\S+)", hooks)[1] == pins["ruff"]
    assert re.search(r"\[clang-format==(\S+)\]", hooks)[1] == pins["clang-format"]


def test_the_lock_has_a_hash_for_every_version_of_the_constraints():
    lock = (ROOT / "constraints-cpu.lock").read_text()
    locked = dict(re.findall(r"(?m)^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", lock))
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    assert len(pins) > 50
    assert locked.pop("triton")  # without CUDA nothing pins it but the lock
    assert locked == pins, "make it again: scripts/lock.py"
