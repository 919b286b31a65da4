"""Training of all weights: in float32 whatever is computed in, saved as diffusers reads them."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from flowkern.checks import ConfigError
from flowkern.models import load_model
from flowkern.train.copies import REFERENCE
from flowkern.train.loop import Loop

FULL = ("lora=null", "train.learning_rate=1e-3", "algorithm.kl_coef=0.1", "train.ema_decay=0.5")
FILE = "transformer/diffusion_pytorch_model.safetensors"
LATEST = "train.resume_from_checkpoint=latest"


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / FILE)


@pytest.mark.long(20)
def test_all_weights_learn_and_a_resume_is_the_uninterrupted_run_bit_for_bit(
    tiny, tmp_path, lines, capsys
):
    straight = Loop(tiny(*FULL, name="straight"))
    before = {n: p.detach().clone() for n, p in straight.task.model.network.named_parameters()}
    straight.run()
    said = f"trains {sum(p.numel() for p in before.values()):,} weights, all of the network"
    assert said in capsys.readouterr().err
    records = lines(tmp_path / "straight/metrics.jsonl")
    assert records[0]["kl"] == 0 < records[1]["kl"] and records[0]["ratio_mean"] == 1
    sites = 16 * 2  # of an optimizer step, each asked of the weights and of the reference
    assert [record["nfe/train"] for record in records] == [2 * sites] * 4
    Loop(tiny(*FULL, "train.steps=2", name="resumed")).run()
    again = Loop(tiny(*FULL, LATEST, name="resumed"))
    again.run()
    for name, count in (("metrics.jsonl", 4), ("validation.jsonl", 1)):
        one, other = (lines(tmp_path / run / name)[-count:] for run in ("straight", "resumed"))
        assert one == other and len(one) == count
    saved, mean = (tmp_path / "straight/checkpoint-4" / name for name in ("", "ema"))
    for one in (saved, mean):
        other = tmp_path / "resumed" / one.relative_to(tmp_path / "straight")
        expected, found = weights_of(one), weights_of(other)
        assert expected.keys() == found.keys() >= before.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    moved = [n for n, p in before.items() if not torch.equal(p, weights_of(saved)[n])]
    unread = [name for name in before if name not in moved]
    assert all("1.attn.add_q_proj" in name or "norm_added_q" in name for name in unread), unread
    with again.weights.using(REFERENCE):  # what the run began with, also after a resume
        here = dict(again.task.model.network.named_parameters())
        assert all(torch.equal(p, here[name]) for name, p in before.items())
    of_diffusers = SD3Transformer2DModel.from_pretrained(saved / "transformer")
    assert all(torch.equal(p, weights_of(saved)[n]) for n, p in of_diffusers.named_parameters())
    assert not any(torch.equal(weights_of(mean)[n], weights_of(saved)[n]) for n in moved)
    with pytest.raises(ConfigError, match="^lora: the run that is resumed trains all weights; exp"):
        Loop(tiny(*FULL[1:], LATEST, name="resumed")).run()


@pytest.mark.long(30)
def test_all_weights_learn_on_two_processes_as_on_one(tiny, tmp_path, lines, train_on):
    """In two updates of a rollout, with the copies that drew it; and go on there bit for bit, or on
    one process as near as sums in another order are."""

    def config(name, origin=None):
        options = [*FULL, "algorithm.updates_per_rollout=2"]
        if origin:
            options.append(f"train.resume_from_checkpoint={tmp_path / origin / 'checkpoint-2'}")
        return tiny(*options, name=name)

    one = Loop(config("one"))
    before = {n: p.detach().clone() for n, p in one.task.model.network.named_parameters()}
    one.run()
    train_on(2, config("two"), config("two_two", "two"))
    Loop(config("two_one", "two")).run()

    def saved(name, folder=""):
        return weights_of(tmp_path / name / "checkpoint-4" / folder)

    for folder in ("", "ema"):
        expected, found = saved("two", folder), saved("two_two", folder)
        assert expected.keys() == found.keys() >= before.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    for file in ("metrics.jsonl", "validation.jsonl"):
        straight = lines(tmp_path / "two" / file)
        late = [record for record in straight if record["step"] > 2]
        assert late and late == lines(tmp_path / "two_two" / file)[-len(late) :]
        for name, expected in (("one", straight), ("two_one", late)):
            found = lines(tmp_path / name / file)[-len(expected) :]
            for record, other in zip(expected, found, strict=True):
                assert other == pytest.approx(record, rel=1e-4, abs=1e-6), name
    for name in ("one", "two_one"):  # in four steps of 1e-3 at most
        found = saved(name)
        assert all((found[n] - value).abs().max() < 5e-5 for n, value in saved("two").items())
    assert max((saved("two")[n] - p).abs().max() for n, p in before.items()) > 1e-3


def test_weights_are_float32_where_the_network_computes_in_bfloat16(
    tiny, tmp_path, monkeypatch, capsys
):
    """Steps smaller than a bfloat16 has places for are not lost; images are drawn in bfloat16."""
    from flowkern.cli import main

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one precision per process
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = ("lora=null", "train.mixed_precision=bf16", "train.learning_rate=1e-6")
    loop = Loop(tiny(*options, "train.steps=2", "data.test_prompts=null"))
    model, seen = loop.task.model, []
    model.network.transformer_blocks[0].attn.to_q.register_forward_hook(
        lambda layer, inputs, output: seen.append((layer.weight.dtype, output.dtype))
    )
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    assert loop.run() == 0
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    saved = weights_of(tmp_path / "run/checkpoint-2")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    steps = torch.cat([(saved[name] - p).abs().flatten() for name, p in before.items()])
    assert 0 < steps.max() < 3e-6 and (steps > 0).float().mean() > 0.8
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert record["ratio_mean"] == 1
    output, loaded = tmp_path / "one.png", []
    write = type(model).load_network
    monkeypatch.setattr(
        type(model), "load_network", lambda self, at: loaded.append(self) or write(self, at)
    )
    arguments = ["sample", str(tmp_path / "run"), "--prompt", "the digit 3"]
    assert main([*arguments, "--num-inference-steps", "2", "--output", str(output)]) == 0
    assert output.read_bytes()[:4] == b"\x89PNG"
    (drawn,) = loaded
    for name, p in drawn.network.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, saved[name].bfloat16())
    coarse = load_model(tiny().model.path, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="^lora: got null, .* in float32, but .* is in bfloat16"):
        Loop(tiny(*options, name="other"), coarse)
