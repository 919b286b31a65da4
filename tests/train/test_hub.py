"""Models of the hub, from a stand-in of its cache: nothing here asks a network."""

import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import torch
from huggingface_hub import constants, errors

from flowkern.models import load_model
from flowkern.models.hub import commit_of, data_commit_of
from flowkern.train.config import ConfigError, DataConfig
from flowkern.train.data import prompts_of
from flowkern.train.loop import Loop

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "assets/digits-sd3"
NAME = "someone/digits.1"
FIRST, SECOND = "1" * 40, "2" * 40


class Cache:
    """As huggingface_hub lays it out: refs/BRANCH holds a commit, snapshots/COMMIT/FILE points to
    blobs/SHA."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repository = root / f"models--{NAME.replace('/', '--')}"

    def commit(self, commit: str, directory: Path, *refs: str) -> None:
        for file in (path for path in directory.rglob("*") if path.is_file()):
            blob = self.repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            link = self.repository / "snapshots" / commit / file.relative_to(directory)
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
        for ref in refs:
            self.ref(ref, commit)

    def ref(self, name: str, commit: str) -> None:
        (self.repository / "refs").mkdir(parents=True, exist_ok=True)
        (self.repository / "refs" / name).write_text(commit)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two commits of the demo model, the second with another network: main is the first."""
    from safetensors.torch import load_file, save_file

    made = Cache(tmp_path / "hub")
    made.commit(FIRST, DIGITS, "main", "v1")
    other = tmp_path / "other"
    shutil.copytree(DIGITS, other)
    file = other / "transformer/diffusion_pytorch_model.safetensors"
    weights = {name: value * 1.01 for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    made.commit(SECOND, other, "v2")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return made


def weight(model) -> torch.Tensor:
    return model.network.proj_out.weight.detach()


def test_an_id_is_a_commit_of_its_own_and_the_adapter_names_it(cache, tmp_path):
    from flowkern.train.config import LoraConfig
    from flowkern.train.lora import add_lora

    plain = weight(load_model(DIGITS))
    for revision, commit in ((None, FIRST), ("v2", SECOND), (SECOND, SECOND), ("v1", FIRST)):
        model = load_model(NAME, revision=revision)
        assert (model.base, model.revision) == (NAME, commit)
        assert torch.equal(weight(model), plain) == (commit == FIRST)
    add_lora(model, LoraConfig(rank=1, target_modules=["to_q"]))
    model.save_lora(tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == (NAME, FIRST)


def test_text_encoders_are_asked_for_when_a_prompt_has_no_row(cache, tmp_path, monkeypatch):
    import huggingface_hub

    asked, download = [], huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *a, **kw: asked.append(kw["allow_patterns"]) or download(*a, **kw),
    )

    def prepared(prompt):
        asked.clear()
        model = load_model(NAME, text_encoders=False)
        model.prepare([prompt], tmp_path / "rows")
        return ["text_encoder/*" in parts for parts in asked]

    assert prepared("the digit 3") == [False, True] and "tokenizer/*" in asked[0]
    assert prepared("the digit 3") == [False]
    for folder in (cache.repository / "snapshots" / FIRST).glob("text_encoder*"):
        shutil.rmtree(folder)
    assert prepared("the digit 3") == [False]
    with pytest.raises(FileNotFoundError, match="^path: .* lacks text_encoder/, which"):
        prepared("the digit 4")


@pytest.mark.parametrize(
    "path, revision, message",
    [
        ("someone/else", None, "path: 'someone/else' is no directory here and no pipeline in the"),
        (NAME, "v3", f"revision: 'v3' of '{NAME}' is not whole in the hub's cache"),
        (str(DIGITS), "v1", "revision: got 'v1', but .* is a directory; expected an id"),
        (DIGITS / "vae", None, "path: .* has no model_index.json; expected a pipeline directory"),
    ],
)
def test_what_is_not_there_is_said_in_a_line_that_names_the_key(cache, path, revision, message):
    with pytest.raises((FileNotFoundError, ValueError), match=f"^{message}") as refused:
        load_model(path, revision=revision)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize("kind, message", [
    ("RepositoryNotFoundError", "path: 'someone/else' is no directory here and no model of"),
    ("GatedRepoError", "path: 'someone/else' asks for consent at http[^ ]*/someone/else, and then"),
    ("RevisionNotFoundError", "revision: 'someone/else' has no 'v9'; expected a branch, a tag or"),
    ("RemoteEntryNotFoundError", "path: 'someone/else' has no model_index.json: it is no pipeline"),
    ("HfHubHTTPError", "path: 'someone/else': 500 Try again later"),
])  # fmt: skip
def test_what_the_hub_answers_is_said_in_a_line(cache, monkeypatch, kind, message):
    answer = SimpleNamespace(headers={}, request=None, status_code=500)

    def refuse(*_, **__):
        raise getattr(errors, kind)("500\n\nTry again later.", response=answer)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(OSError, match=f"^{message}") as refused:
        load_model("someone/else", revision="v9")
    assert "\n" not in str(refused.value)


def test_a_connection_that_breaks_on_the_way_is_said_in_a_line(cache, monkeypatch):
    class ReadError(Exception):
        """As the transport has it: no OSError."""

    def breaks(*_, **__):
        raise ReadError("reset\nby peer")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", breaks)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", breaks)
    monkeypatch.setattr("flowkern.models.hub.no_answer", lambda: None)
    with pytest.raises(OSError, match="^path: 'someone/else': the hub: ReadError: reset by peer$"):
        commit_of("someone/else")
    assert data_commit_of("someone/prompts", None) is None, "who reads it says why"


def test_a_run_keeps_its_commit_when_its_branch_moves(cache, tiny, tmp_path, capsys):
    """Whatever main has become, a resume and `flowkern sample` get the weights of the run."""
    from flowkern.cli import main
    from flowkern.train.config import ConfigError, load_sampling
    from flowkern.train.loop import Loop

    here = (f"model.path={NAME}", "train.steps=2", "data.test_prompts=null")
    assert Loop(tiny(*here)).run() == 0
    for file in ("config.yaml", "checkpoint-2/config.yaml"):
        model = load_sampling(tmp_path / "run" / file).model
        assert (model.path, model.revision) == (NAME, FIRST)
    cache.ref("main", SECOND)
    latest = "train.resume_from_checkpoint=latest"
    loop = Loop(tiny(*here, latest, "train.steps=4"))
    assert loop.run() == 0 and loop.global_step == 4 and loop.task.model.revision == FIRST
    with pytest.raises(ConfigError, match=f"^model.revision: got '{SECOND}', but the run that is"):
        Loop(tiny(*here, latest, "train.steps=4", "model.revision=main")).run()
    assert Loop(tiny(*here, name="new")).config.model.revision == SECOND
    output = tmp_path / "one.png"
    arguments = ["sample", str(tmp_path / "run"), "--prompt", "the digit 3", "--output"]
    assert main([*arguments, str(output), "--num-inference-steps", "2"]) == 0
    shutil.rmtree(cache.repository / "snapshots" / FIRST)
    capsys.readouterr()
    assert main([*arguments, str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flowkern: model.revision: '{FIRST}' of '{NAME}' is not whole in")
    assert error.count("\n") == 1


def test_the_command_refuses_an_id_that_is_not_in_the_cache(cache, tiny_file, capsys):
    from flowkern.cli import main

    capsys.readouterr()
    for options, key in (([], "path"), (["model.revision=v9"], "path")):
        assert main(["train", str(tiny_file("model.path=someone/else")), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"flowkern: model.{key}: 'someone/else' is no directory here")
        assert error.count("\n") == 1


def test_without_a_network_one_question_is_asked_and_one_line_said(cache, monkeypatch, capfd):
    """huggingface_hub asks a host that is not there six times, in 23 s, with two lines for each."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        place = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    assert commit_of(NAME) == FIRST
    with pytest.raises(FileNotFoundError, match="^path: .* and the hub cannot be reached: .*refu"):
        commit_of("someone/else")
    pytest.importorskip("datasets", reason="datasets is not installed: flowkern[data]")
    with pytest.raises(ConfigError, match="^data.train_prompts: .* is not in the cache of"):
        prompts_of(DataConfig(train_prompts="someone/prompts"), "train_prompts")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "options, said",
    [
        (["algorithm.prompts_per_rollout=400"], "algorithm.prompts_per_rollout: got 400, expected"),
        (["data.test_prompts=/none.txt"], "data.test_prompts: cannot read '/none.txt'"),
        (["output_dir={file}"], "output_dir: '{file}' is no directory"),
        (["output_dir={run}"], "output_dir: '{run}' holds a run already"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_looked_for(
    cache, tiny, tmp_path, monkeypatch, options, said
):
    monkeypatch.setattr("flowkern.models.hub.no_answer", lambda: pytest.fail("it was looked for"))
    places = {"file": tmp_path / "file", "run": tmp_path / "begun"}
    places["file"].write_text("")
    (places["run"] / "checkpoint-4").mkdir(parents=True)
    given = [option.format(**places) for option in options]
    with pytest.raises(ConfigError, match=f"^{re.escape(said.format(**places))}"):
        Loop(tiny(f"model.path={NAME}", *given))
