"""A planner under the loop: its laws, its files, its refusals."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from legend import unknown
from safetensors.torch import load_file

from flowkern.checks import ConfigError
from flowkern.train.config import load_config
from flowkern.train.loop import Loop
from flowkern.train.validation_config import ANSWERED

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets/agent-demo"
TINY = [
    f"model.path={DEMO / 'planner'}",
    f"data.train_prompts={DEMO / 'train.jsonl'}",
    f"data.test_prompts={DEMO / 'test.jsonl'}",
    "agent.tools.search.kind=lookup_tool:Lookup",
    f"agent.tools.search.passages={DEMO / 'passages.jsonl'}",
    "algorithm.group_size=4",
    "algorithm.prompts_per_rollout=4",
    "algorithm.skip_flat=false",
    "train.steps=4",
    "train.max_batch=16",
    "train.checkpointing_steps=2",
    "train.learning_rate=1e-3",
    "validation.num_prompts=6",
]


@pytest.fixture
def planner(tmp_path, undrawn, monkeypatch):
    """planner("key=value", ..., name="run"): a configuration whose output_dir is tmp_path/name."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = tmp_path / "demo.yaml"
    text = (ROOT / "configs/agent/demo.yaml").read_text()
    path.write_text(text.replace(", top: 1", ""))

    def make(*overrides, name="run"):
        return load_config(path, [*TINY, f"output_dir={tmp_path / name}", *overrides])

    return make


def weights(path):
    return load_file(path / "model.safetensors")


def test_a_run_is_the_same_stopped_and_resumed(planner, tmp_path, lines):
    loop = Loop(planner(name="whole"))
    loop.run()
    Loop(planner("train.steps=2", name="parts")).run()
    Loop(planner("train.resume_from_checkpoint=latest", name="parts")).run()
    whole, again = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert whole == again and len(whole) == 4
    ends = [weights(tmp_path / name / "checkpoint-4") for name in ("whole", "parts")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    evaluations = lines(tmp_path / "whole/validation.jsonl")
    assert [one["step"] for one in evaluations] == [0, 4]
    kinds = {f"eval/success/{kind}" for kind in ("total", "difference", "times")}
    wanted = {"eval/success", "eval/success_greedy", "eval/malformed", "turns/mean", "tool/failed"}
    assert kinds | wanted | {"tokens/prompt", "tokens/response"} <= evaluations[0].keys()
    others = {key for key in evaluations[0] if not key.startswith(("reward/", "eval/success"))}
    assert others | set(ANSWERED[:2]) == {"step", *ANSWERED}, "known before there is one"
    assert not unknown(*whole, *evaluations) and "entropy" in whole[0]
    first = whole[0]
    assert first["ratio_mean"] == 1 and whole[1]["ratio_mean"] != 1
    assert first["nfe/sample"] > first["nfe/train"] > 0 and first["turns/mean"] > 2
    # What is shown of the way comes to its end, whatever trajectories ended early.
    asked = 2 * 2 * len(loop.task.held_out) * loop.config.agent.max_turns
    assert loop.task.done == loop.iteration * sum(loop.task.planned(0).values()) + asked


def test_two_processes_are_one(planner, tmp_path, train_on, lines):
    options = "algorithm.entropy_coef=0.01", "train.max_batch=5"
    train_on(2, planner(*options, name="two"))
    Loop(planner(*options, name="one")).run()
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert math.isclose(mine[key], theirs[key], rel_tol=2e-3, abs_tol=1e-6), key
    assert (
        lines(tmp_path / "one/validation.jsonl")[0] == lines(tmp_path / "two/validation.jsonl")[0]
    )


@pytest.mark.parametrize("targets", ["null", "[q_proj, lm_head]"])
def test_an_adapter_learns_and_is_loaded_again(planner, tmp_path, targets):
    adapter = f"lora={{rank: 4, alpha: 8, target_modules: {targets}}}"
    options = adapter, "train.steps=2", "algorithm.kl_coef=0.1"
    loop = Loop(planner("train.checkpointing_steps=2", *options))
    loop.run()
    saved = tmp_path / "run/checkpoint-2"
    assert (saved / "adapter_model.safetensors").is_file() and (saved / "tokenizer.json").is_file()
    learned = load_file(saved / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for key, value in learned.items() if "lora_B" in key)
    other = Loop(planner(*options, name="other"))
    other.load(saved)
    for mine, theirs in zip(loop.parameters, other.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_in_half_the_bits_the_samplers_probabilities_are_corrected_for(planner, lines, tmp_path):
    """They are not the trainer's own; the ratio is to the trainer's, and about 1."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    loop = Loop(planner("train.mixed_precision=bf16", "train.steps=2"))
    experience = loop.task.collect(0)
    apart = (experience.old - experience.turns.sample_log_prob).abs().max()
    assert not loop.task.is_exact and 1e-6 < apart < 0.3
    loop.run()
    AcceleratorState._reset_state()
    first, second = lines(tmp_path / "run/metrics.jsonl")
    assert abs(first["ratio_mean"] - 1) < 1e-3 < abs(second["ratio_mean"] - 1) < 0.05
    assert {str(p.dtype) for p in loop.parameters} == {"torch.float32"}


@pytest.mark.parametrize("agg", ["turn_mean", "token_mean", "seq_mean", "constant"])
def test_the_gradient_is_the_formulas_however_rows_are_split(planner, agg):
    """Against logits in one padded batch and three loops: over trajectories, turns, tokens."""
    found = []
    for most in (3, 64):
        loop = Loop(
            planner(f"train.max_batch={most}", f"algorithm.agg={agg}", "algorithm.kl_coef=0")
        )
        experience = loop.task.collect(0)
        losses = []
        for batch in loop.task.batches(experience, 0):
            out = loop.task.loss(batch, loop.weights)
            loop.accelerator.backward(out.loss)
            losses.append(out.loss.item())
        found.append((sum(losses), [p.grad.clone() for p in loop.parameters]))
        for parameter in loop.parameters:
            parameter.grad = None
    naive = _naive(loop.task, experience, agg)
    naive.backward()
    for loss, gradients in found:
        assert math.isclose(loss, naive.item(), rel_tol=1e-4, abs_tol=1e-6)
        for mine, parameter in zip(gradients, loop.parameters, strict=True):
            torch.testing.assert_close(mine, parameter.grad, atol=2e-6, rtol=2e-3)


def _naive(task, experience, agg):
    turns, half = experience.turns, 8  # of 16 trajectories, the first update's
    model, total = task.policy.model, 0
    rows = [i for i, one in enumerate(turns.trajectory.tolist()) if one < half]
    tokens = sum(int(turns.length[i]) for i in rows)
    for trajectory in range(half):
        mine = [i for i in rows if turns.trajectory[i] == trajectory]
        in_all = sum(int(turns.length[i]) for i in mine)
        for i in mine:
            prompt, size = int(turns.prompt[i]), int(turns.length[i])
            log_p = model(turns.ids[i][None]).logits[0].log_softmax(-1)
            for place in range(prompt, prompt + size):
                log_prob = log_p[place - 1, turns.ids[i][place]]
                ratio = (log_prob - log_prob.detach()).exp()
                weight = {
                    "turn_mean": 1 / (half * len(mine) * size),
                    "seq_mean": 1 / (half * in_all),
                    "token_mean": 1 / tokens,
                    "constant": 1 / (half * 5 * 16),
                }[agg]
                total = total - weight * experience.advantage[i] * ratio
    return total


def test_what_cannot_be_trained_is_said_in_a_line(planner, tmp_path):
    (tmp_path / "bare.jsonl").write_text(json.dumps({"prompt": "p"}) + "\n")
    for override, message in {
        f"model.path={tmp_path}": "model.path: .* is no language model that can be loaded",
        f"data.train_prompts={tmp_path / 'bare.jsonl'}": 'question 1 of .* has no "answer"',
        "algorithm.prompts_per_rollout=4096": "data.train_prompts|prompts_per_rollout",
        "agent.engine.rows=3": "agent.engine.rows: unknown key; known are max_batch",
        "agent.tools={calculator: {}}": r"agent.tools: got \['calculator'\], expected",
        "agent.modules={url: x}": "agent.modules.url: unknown key",
        f"agent.prompts={tmp_path / 'none'}": "agent.prompts: got .* expected a folder",
        "validation.metric=eval/sucess": r"got eval/sucess, .*KIND; did you mean eval/success\?$",
        "validation.collapse={eval/success_greedy/totl: 1}": "collapse: got .*difference, .*total",
        "validation.metric=eval/malformd": r"validation.metric: .* did you mean eval/malformed\?$",
    }.items():
        with pytest.raises(ConfigError, match=message):
            Loop(planner(override))
