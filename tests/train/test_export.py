"""flowkern export: diffusers draws from it what the run drew; its card; a stand-in of the hub."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import torch
from huggingface_hub import ModelCard, constants

from flowkern.cli import main
from flowkern.ops._common.philox import philox_normal
from flowkern.rollout import prompt_ids
from flowkern.train.loop import EVALUATED, Loop
from flowkern.train.validation import SAMPLE_ITERATION, Sampler, sample_images

PROMPT = "a handwritten digit zero"  # which is held out


class Hub(ThreadingHTTPServer):
    """What an upload asks of the hub: to make a model, how files come, a commit of them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked, self.files, self.refuses = [], {}, False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({"id": "me/digits", "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((path, self.headers.get("Authorization")))
        if hub.refuses:
            return self.answer({"error": "no room"}, 507)
        if path == "/api/repos/create":
            hub.made = json.loads(body)
            return self.answer({"url": f"{hub.url}/me/digits", "id": "me/digits"})
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            return self.answer({"files": modes})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{hub.url}/me/digits/commit/{'1' * 40}"
            return self.answer({"success": True, "commitUrl": url, "commitOid": "1" * 40})
        return self.answer({"errors": [], "warnings": []})  # of a card's header

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    yield server
    server.shutdown()
    server.server_close()


def drawn_by(pipe, model) -> torch.Tensor:
    """By diffusers alone, of the noise of `flowkern sample`."""
    ids = prompt_ids(SAMPLE_ITERATION, torch.tensor([0]))
    noise = philox_normal((1, *model.latent_shape), 0, ids, 0, "init")
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 8}
    return pipe(PROMPT, latents=noise, output_type="pt", **asked).images


def test_diffusers_draws_what_was_validated_and_the_card_says_what_it_is(
    tiny, tmp_path, hub, capsys
):
    from diffusers import DiffusionPipeline

    base = tmp_path / "base"
    shutil.copytree(tiny().model.path, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine-1\n---\n# base\n")
    options = ["train.steps=2", "train.learning_rate=2e-2", "train.ema_decay=0.5"]
    options += ["model.max_sequence_length=8", "validation.guidance_scale=1.0"]
    push = ["train.push_to_hub=true", "train.hub_model_id=me/digits", "train.hub_private_repo=true"]
    loop = Loop(tiny(*options, *push, f"model.path={base}", "validation.num_prompts=2"))
    model, run = loop.task.model, tmp_path / "run"
    (run / "hub").mkdir(parents=True)
    (run / "hub/stale.txt").write_text("of an earlier run")
    assert loop.run() == 0
    assert f"pushed to {hub.url}/me/digits\n" in capsys.readouterr().err
    ids = prompt_ids(SAMPLE_ITERATION, torch.tensor([0]))
    with loop.weights.using(EVALUATED):
        expected = sample_images(model, [PROMPT], ids, Sampler(2), seed=0)
    adapter, pipe = run / "hub", DiffusionPipeline.from_pretrained(base)
    assert (drawn_by(pipe, model) - expected).abs().max() > 0.01
    pipe.load_lora_weights(adapter)
    torch.testing.assert_close(drawn_by(pipe, model), expected, rtol=0, atol=1e-5)
    merged = tmp_path / "merged"
    assert main(["export", str(run / "checkpoint-2"), "--merged", "--output", str(merged)]) == 0
    pipe = DiffusionPipeline.from_pretrained(merged)
    torch.testing.assert_close(drawn_by(pipe, model), expected, rtol=0, atol=1e-5)

    card = ModelCard.load(adapter / "README.md")
    assert card.data.license == "other" and card.data.license_name == "mine-1"
    assert card.data.pipeline_tag == "text-to-image" and "lora" in card.data.tags
    assert card.data.base_model is None and str(tmp_path) not in str(card), "no folder of here"
    for said in (
        "flow_grpo, 2 optimizer steps; the running mean",
        'pipe("a prompt", max_sequence_length=8, num_inference_steps=2, guidance_scale=1.0).images',
        "| its licence | mine-1 |",
        "| digits_judge | 0, a judge | ",
        "![held-out prompts](samples.png)",
        'pipe.load_lora_weights("me/digits", weight_name="pytorch_lora_weights.safetensors")',
    ):
        assert said in card.text, said
    assert "lora" not in ModelCard.load(merged / "README.md").data.tags
    names = {path.name for path in adapter.iterdir()}
    assert names == hub.files.keys() == {
        "README.md", "config.yaml", "adapter_config.json", "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors", "reward_curve.png", "samples.png",
    }  # fmt: skip
    assert all(hub.files[name] == (adapter / name).read_bytes() for name in names)
    assert hub.made["name"] == "digits" and hub.made["organization"] == "me"
    assert {token for _, token in hub.asked} == {"Bearer hf_mine"}

    capsys.readouterr()
    hub.refuses = True
    again = ["export", str(run), "--push-to-hub", "--hub-model-id", "me/digits", "--output"]
    assert main([*again, str(tmp_path / "again")]) == 1
    error = capsys.readouterr().err
    assert "again' is written, and cannot be pushed to 'me/digits': " in error
    assert (tmp_path / "again/README.md").is_file() and error.count("\n") == 1


def test_whole_weights_and_what_cannot_be_exported(tiny, tmp_path, monkeypatch, capsys):
    from diffusers import SD3Transformer2DModel

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    loop = Loop(tiny("lora=null", "train.mixed_precision=no", "data.test_prompts=null"))
    loop.begin()
    with torch.no_grad():
        loop.task.model.network.proj_out.weight.add_(1)
    run = tmp_path / "run"
    assert main(["export", str(run)]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    loop.checkpoint()
    (tmp_path / "new").mkdir()
    assert main(["export", str(run), "--output", str(tmp_path / "new")]) == 0
    network = SD3Transformer2DModel.from_pretrained(tmp_path / "new", subfolder="transformer")
    assert torch.equal(network.proj_out.weight, loop.task.model.network.proj_out.weight)
    card = (tmp_path / "new/README.md").read_text()
    assert "pipe.transformer = type(pipe.transformer).from_pretrained(" in card
    assert "| its licence | not said by its files here |" in card
    best = run / "best.json"
    best.write_text('{"step": 0, "metric": "reward/mean", "value": 1}')
    assert main(["export", str(run), "--best", "--output", str(tmp_path / "best")]) == 0
    assert (tmp_path / "best/README.md").read_text() == card
    best.write_text("[]")
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken/checkpoint-0"
    shutil.copytree(run / "checkpoint-0", broken)
    (broken / "state.pt").write_bytes(b"half")
    new = ["--output", str(tmp_path / "other")]
    hub = ["--push-to-hub", "--hub-model-id"]
    capsys.readouterr()
    for arguments, status, said in (
        (["nowhere"], 2, "checkpoint: there is no folder 'nowhere'"),
        ([str(tmp_path / "empty")], 2, "is no checkpoint"),
        ([str(broken)], 2, "state.pt has 4 bytes"),
        ([str(run), "--best"], 2, f"--best: {str(best)!r} is not what was written"),
        ([str(broken.parent), "--best"], 2, "which a run with validation.metric writes"),
        ([str(run), "--output", str(tmp_path / "new")], 2, "is there; remove it, or name another"),
        ([str(run), "--output", str(run / "config.yaml")], 2, "is there; remove it"),
        ([str(run), "--output", "/proc/none"], 1, "/proc/none cannot be written: "),
        ([str(run), *new, "--push-to-hub"], 2, "expected --hub-model-id OWNER/NAME beside it"),
        ([str(run), *new, "--private"], 2, "--private: expected --push-to-hub beside it"),
        ([str(run), *new, *hub, "a b/c"], 2, "--hub-model-id: "),
        ([str(run), *new, *hub, "digits"], 2, "got 'digits', expected OWNER/NAME"),
        ([str(run), *new, *hub, "me/digits"], 2, "nobody is logged in here: hf auth login"),
    ):
        assert main(["export", *arguments]) == status, arguments
        lines = capsys.readouterr().err.splitlines()
        assert said in lines[-1] and lines[-1].startswith("flowkern: "), (arguments, lines)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("copyfile", "copytree"):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, name, full)
            assert main(["export", str(run), *new]) == 1
        said = capsys.readouterr().err
        assert "/other cannot be written: " in said and "No space left on device" in said
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("options, said", [
    (["train.push_to_hub=true"], "train.hub_model_id: expected beside train.push_to_hub=true"),
    (["train.hub_model_id=a/b"], "train.hub_model_id: expected beside train.push_to_hub=true"),
    (["train.hub_private_repo=true"], "train.hub_private_repo: got true, but"),
])  # fmt: skip
def test_options_of_the_hub_that_have_no_effect_are_refused(tiny, options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        tiny(*options)
