"""Every algorithm through the loop, small: what it costs, that it begins on policy, that it is
the same on two processes and after a resume.
"""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from huggingface_hub import ModelCard
from legend import unknown
from safetensors.torch import load_file, save_file

from flowkern.models import Guidance
from flowkern.rl.algorithms import names
from flowkern.rl.cost import network_calls
from flowkern.rl.plans import cost_of
from flowkern.train.config import ConfigError, from_dict, to_dict
from flowkern.train.doctor import examine
from flowkern.train.export import export
from flowkern.train.loop import Loop

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "guidance_scale": 1.0,
    "group_size": 3,
    "prompts_per_rollout": 4,
    "updates_per_rollout": 2,
}
SMALL = {
    "awm": {"num_inference_steps": 4, "num_train_timesteps": 2},
    "branch_grpo": {"num_inference_steps": 4, "split_steps": [0, 1]},
    "dance_grpo": {"num_inference_steps": 4},
    "dense_grpo": {"num_inference_steps": 3},
    "crd": {"num_inference_steps": 3},
    "dgpo": {"num_inference_steps": 4, "num_train_timesteps": 2, "ref_guidance_scale": 2.0},
    "diffusion_nft": {"num_inference_steps": 4},
    "diffusion_opd": {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "teacher_guidance_scale": 1.5,
    },
    "flash_grpo": {"num_inference_steps": 5},
    "flow_dppo": {"num_inference_steps": 5, "num_sde_steps": 2},
    "flow_grpo": {"num_inference_steps": 3, "guidance_scale": 2.0},
    "flow_grpo_fast": {
        "num_inference_steps": 6,
        "branching": True,
        "window_per_prompt": True,
    },  # whose windows cost another number of calls each
    "g2rpo": {"num_inference_steps": 6, "branch_steps": 2, "granularities": [1, 2, 3]},
    "gardo": {
        "num_inference_steps": 4,
        "kl_share": 0.5,
        "kl_thres": 1.0,
        "auxiliary_rewards": ["distance_to_real"],
        "diversity_reward": "digits_diversity",
    },
    "grpo_guard": {"num_inference_steps": 3},
    "mixgrpo": {"num_inference_steps": 8, "window": 2, "window_iterations": 1},
    "mixgrpo_flash": {"num_inference_steps": 8, "window": 2, "window_iterations": 1},
    "mixgrpo_flash_star": {"num_inference_steps": 16, "window": 2},
    "pref_grpo": {"num_inference_steps": 4, "group_size": 4},
    "tempflow_grpo": {"num_inference_steps": 3, "num_seeds": 2},
    "tree_rpo": {"num_inference_steps": 5, "window": 2, "window_iterations": 1},
}


ASKED = {name: {"weight": 0} for name in ("distance_to_real", "digits_diversity")}


@pytest.fixture
def teacher(tiny, tmp_path):
    """teacher(): a checkpoint's adapter of the same shape, which says something else."""

    def make() -> Path:
        place = tmp_path / "teacher"
        if not place.is_dir():
            loop = Loop(tiny(name="of-teacher"))
            torch.manual_seed(3)
            with torch.no_grad():
                for weight in loop.parameters:
                    weight.copy_(0.1 * torch.randn_like(weight))
            loop.task.save(place)
        return place

    return make


@pytest.fixture
def small(tiny, teacher):
    """small(algorithm): a configuration that takes a second."""

    def make(name: str, directory: str = "run", **train):
        tree = to_dict(tiny("train.steps=4", "validation.num_prompts=2", name=directory))
        tree["algorithm"] = {"name": name, **COMMON, **SMALL[name]}
        if name == "gardo":
            tree["reward"] |= ASKED
        if name == "diffusion_opd":
            tree["algorithm"]["teacher"] = str(teacher())
        tree["train"] |= train
        return from_dict(tree)

    return make


def test_every_algorithm_is_tried():
    assert sorted(SMALL) == names()


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


FORGETFUL = """
class Reward:
    may_fail = True
    def __call__(self, images, prompts, metadata, *, group):
        scores = images.flatten(1).mean(1).double()
        for i in range(len(images)):
            if group[i] == 1 or (group[i] != 2 and i > 0 and group[i] == group[i - 1]
                                 and (i < 2 or group[i] != group[i - 2])):
                scores[i] = float("nan")
        return scores
"""
"""Knows nothing of the second image of a prompt, nor of any of the second prompt."""

ONE_STEP_EACH = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[0]).parent))
from flowkern.train.config import from_dict
from flowkern.train.distributed import finish
from flowkern.train.loop import Loop
for tree in json.loads(sys.argv[1]):
    loop = Loop(from_dict(tree))
    records = loop.step()
    if os.environ["RANK"] == "0":  # two that write have each other's ends in one file
        path = Path(tree["output_dir"]).with_suffix(".jsonl")
        path.write_text("".join(json.dumps(record) + "\\n" for record in records))
finish(loop.accelerator)
"""


@pytest.mark.long(20)
def test_the_first_step_is_the_same_on_two_processes(
    small, tmp_path, on_processes, lines, monkeypatch
):
    """Of every algorithm, in one pair of processes, with images that have no reward: more of them
    on one process than on the other."""
    written(tmp_path / "forgetful.py", FORGETFUL)
    monkeypatch.syspath_prepend(tmp_path)
    program = written(tmp_path / "program.py", ONE_STEP_EACH)

    def config(name, directory):
        tree = to_dict(small(name, directory, max_failed_rewards=1.0))
        reward = {"light": {"kind": "forgetful:Reward", "scale": 9}}
        return from_dict(tree | {"reward": reward | (ASKED if name == "gardo" else {})})

    on_processes(2, program, json.dumps([to_dict(config(name, name)) for name in names()]))
    for name in names():
        loop = Loop(config(name, f"{name}-alone"))
        records = loop.step()
        of_one = "".join(json.dumps(record) + "\n" for record in records)
        of_one = lines(written(tmp_path / "of_one.jsonl", of_one))
        for two, one in zip(lines(tmp_path / f"{name}.jsonl"), of_one, strict=True):
            # Calls are as many on both, whatever each has to learn.
            assert two.pop("nfe/train") >= one.pop("nfe/train")
            assert two == pytest.approx(one, rel=2e-3, abs=1e-6), name
        leaves = len(loop.recipe.plan(loop.task.model.sigmas, 0, 0).leaves)
        assert records[0]["failed_rewards"] == records[0]["failed_rewards/light"] == leaves + 2
        assert records[0]["reward/mean"] == pytest.approx(9 * records[0]["reward/light"])
        assert all(record["grad_norm"] > 0 for record in records)


@pytest.mark.parametrize("name", names())
def test_it_costs_what_its_plan_says_and_begins_on_policy(small, name):
    loop = Loop(small(name))
    recipe = loop.recipe
    for iteration in range(2):
        cost = cost_of(recipe.plans(loop.task.model.sigmas, loop.iteration, 0))
        sampled, trained = network_calls(recipe, cost, loop.iteration)
        records = loop.step()
        assert records[0]["nfe/sample"] == sampled <= records[0]["nfe/naive_sample"]
        assert [record["nfe/train"] for record in records] == trained
        is_on_policy = recipe.sampler is None or iteration == 0
        assert records[0]["ratio_mean"] == pytest.approx(1, abs=0 if is_on_policy else 1e-5)
        assert all(record["grad_norm"] > 0 for record in records)
        assert not unknown(*records)
    before = [p.detach().clone() for p in loop.parameters]
    assert any(p.abs().sum() > 0 for p in before)


@pytest.mark.long(70)
def test_a_run_goes_on_with_any_number_of_processes(
    tiny, tiny_file, tmp_path, lines, on_processes, train_on
):
    """Two processes train as one does. From one to, by the file that launchers start, two; from two
    to two, to one and to four; two to two bit for bit.
    """

    def config(name: str, origin: str | None = None, make=tiny):
        options = (
            [f"train.resume_from_checkpoint={tmp_path / origin / 'checkpoint-2'}"] if origin else []
        )
        return make("validation.num_prompts=4", "train.ema_decay=0.9", *options, name=name)

    Loop(config("one")).run()
    train_on(2, config("two"), config("two_two", "two"))
    train_on(4, config("two_four", "two"))
    Loop(config("two_one", "two")).run()
    on_processes(2, ROOT / "scripts/train.py", config("one_two", "one", tiny_file))
    straight = lines(tmp_path / "two/metrics.jsonl")
    assert straight[0] == pytest.approx(
        lines(tmp_path / "one/metrics.jsonl")[0], rel=1e-4, abs=1e-6
    )
    assert straight[2:] == lines(tmp_path / "two_two/metrics.jsonl")
    paths = [
        tmp_path / name / "checkpoint-4/ema/adapter_model.safetensors"
        for name in ("two", "two_two")
    ]
    weights, same = map(load_file, paths)
    assert all(torch.equal(same[key], value) for key, value in weights.items())
    for name in ("one", "one_two", "two_one", "two_four"):
        for file in ("metrics.jsonl", "validation.jsonl"):
            begin = 0 if name == "one" else 3
            expected, found = (
                [r for r in lines(tmp_path / run / file) if r["step"] >= begin]
                for run in ("two", name)
            )
            assert len(found) == len(expected) > 0
            for a, b in zip(expected, found, strict=True):  # AdamW blows rounding up
                assert b == pytest.approx(a, rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("name", ["awm", "diffusion_nft"])
def test_copies_of_the_weights_survive_a_resume(small, name, lines):
    extra = {"checkpointing_steps": 2, "ema_decay": 0.9}
    straight, resumed = (Loop(small(name, run, **extra)) for run in ("straight", "resumed"))
    assert straight.run() == 0
    update = resumed.update

    def asked_to_stop(*arguments):  # after the first of the second rollout's two updates
        record = update(*arguments)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    resumed.update = asked_to_stop
    assert resumed.run() == 128 + signal.SIGTERM
    directory = resumed.directory.path
    assert (directory / "checkpoint-3").is_dir() and not (directory / "checkpoint-4").exists()
    again = Loop(small(name, "resumed", **extra, resume_from_checkpoint="latest"))
    again.run()
    for file in ("metrics.jsonl", "validation.jsonl"):
        expected = lines(straight.directory.path / file)
        assert lines(directory / file) == expected and len(expected) >= 2
    states = [
        torch.load(loop.directory.path / "checkpoint-4/state.pt", weights_only=True)["copies"][
            "copies"
        ]
        for loop in (straight, again)
    ]
    assert states[0].keys() == states[1].keys() >= {*straight.recipe.copies, "evaluated"}
    for key, copy in states[0].items():
        assert all(map(torch.equal, copy, states[1][key])), key
    averaged = directory / "checkpoint-4/ema/adapter_model.safetensors"
    assert averaged.read_bytes() != (averaged.parents[1] / averaged.name).read_bytes()


def test_an_anchor_is_made_anew_by_the_clock_and_where_the_weights_are_far_from_it(small):
    """Then it equals them, and is not asked in the update after it."""
    for options, expected in (
        ({"reset_freq": 2, "kl_thres": 1e9}, [True, False, True]),
        ({"reset_freq": 99, "kl_thres": 1e-12}, [True, True, True]),
    ):
        tree = to_dict(small("gardo", learning_rate=1e-2))
        tree["algorithm"] |= options
        loop, found = Loop(from_dict(tree)), []
        for _ in expected:
            found.append(loop.weights.is_current("anchor"))
            records = loop.step()
            assert (records[0]["kl"] == 0) == found[-1] and records[1]["kl"] > 0
        assert found == expected


def test_a_student_becomes_its_teacher(small, teacher):
    """Whose weights are read, and no part of a checkpoint."""
    loop = Loop(small("diffusion_opd", learning_rate=3e-3))
    stored = load_file(teacher() / "adapter_model.safetensors")
    with loop.weights.using("teacher"):
        here = [p.detach().clone() for p in loop.parameters]
    assert sorted(x.sum().item() for x in here) == sorted(x.sum().item() for x in stored.values())
    found = [record["kl"] for _ in range(8) for record in loop.step()]
    assert 0 < max(found[-4:]) < 0.5 * found[0]
    assert "teacher" not in loop.copies.state_dict()["copies"]
    with loop.weights.using("teacher"):
        assert all(map(torch.equal, here, loop.parameters))


def test_a_teacher_that_is_none_is_refused(small, teacher, tmp_path):
    tree = to_dict(small("diffusion_opd"))
    (tmp_path / "empty").mkdir()
    for section, options, message in (
        ("algorithm", {"teacher": None}, "got null, expected a folder checkpoint-N"),
        ("algorithm", {"teacher": str(tmp_path / "no")}, "there is no folder '.*no'"),
        (
            "algorithm",
            {"teacher": str(tmp_path / "empty")},
            "'.*empty' has no adapter.*without --merged",
        ),
        ("lora", {"alpha": 64}, ".*lora_alpha 32.*, expected lora.alpha, 64"),
        ("lora", {"rank": 2}, r"lora.rank: '.*' has shape .*, expected \("),
        ("lora", {"target_modules": ["to_q"]}, "lora.target_modules: .* holds '.*'; expected"),
    ):
        changed = tree | {section: tree[section] | options}
        with pytest.raises(ConfigError, match=f"^algorithm.teacher: {message}") as raised:
            Loop(from_dict(changed))
        assert "\n" not in str(raised.value)
    weights, said = teacher() / "adapter_model.safetensors", teacher() / "adapter_config.json"
    stored = load_file(weights)
    save_file({name: x / 0 for name, x in stored.items()}, weights)
    with pytest.raises(ConfigError, match="^algorithm.teacher: '.*' has weights that are not fin"):
        Loop(from_dict(tree))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="^algorithm.teacher: '.*teacher' cannot be read: "):
        Loop(from_dict(tree))
    said.write_text(json.dumps(json.loads(said.read_text()) | {"alpha_pattern": [4]}))
    with pytest.raises(ConfigError, match="^algorithm.teacher: '.*' has no adapter"):
        Loop(from_dict(tree))


def test_a_teacher_stays_for_the_whole_of_a_run(small, teacher, tmp_path, monkeypatch):
    tree = to_dict(small("diffusion_opd", steps=2, checkpointing_steps=2))
    loop = Loop(from_dict(tree))
    loop.begin()
    loop.advance_to(2)
    monkeypatch.chdir(tmp_path)
    card = ModelCard.load(export(Path("run/checkpoint-2")) / "README.md")
    assert "distillation" in card.data.tags and "learned from a teacher" in card.text
    assert not any("reinforcement" in said for said in (card.text, *card.data.tags))
    tree["train"] |= {"resume_from_checkpoint": "latest"}
    tree["algorithm"] |= {"teacher": "teacher"}  # the same folder
    Loop(from_dict(tree)).begin()
    for own in ("run/checkpoint-2", "run/checkpoint-2/ema"):
        Path(own).mkdir(exist_ok=True)
        changed = tree | {"algorithm": tree["algorithm"] | {"teacher": own}}
        with pytest.raises(ConfigError, match=f"^algorithm.teacher: '{own}' is of output_dir"):
            Loop(from_dict(changed))
    weights = teacher() / "adapter_model.safetensors"
    save_file({name: x * 2 for name, x in load_file(weights).items()}, weights)
    with pytest.raises(ConfigError, match="^algorithm.teacher: holds other weights than when"):
        Loop(from_dict(tree)).begin()


def test_doctor_names_no_clip_range_where_a_teacher_is_followed(small):
    options = {"noise_level": 1e-4, "num_inference_steps": 2}  # ratios that no loss has
    tree = to_dict(small("diffusion_opd"))
    report = examine(Loop(from_dict(tree | {"algorithm": tree["algorithm"] | options})))
    assert report.clip is None and report.is_sound
    assert not any("clip" in note for note in report.notes)


def test_a_reference_is_not_guided_where_the_model_takes_no_guidance(small):
    tree, model = to_dict(small("crd")), SimpleNamespace(guidance=Guidance("none"))
    tree["validation"]["guidance_scale"] = 1.0
    with pytest.raises(ConfigError, match=r"^algorithm.ref_guidance_scale: got 4.5, .*guidance$"):
        Loop(from_dict(tree), model)


def test_a_reward_that_credit_asks_is_there(small):
    tree = to_dict(small("gardo"))
    for option, value, message in (
        ("auxiliary_rewards", ["beauty"], "auxiliary_rewards: got 'beauty', expected one of the"),
        ("auxiliary_rewards", [], "auxiliary_rewards: got none, expected the name of one"),
        ("diversity_reward", "range", "diversity_reward: got 'range', expected one of the"),
    ):
        algorithm = tree["algorithm"] | {option: value}
        with pytest.raises(ConfigError, match=f"algorithm.{message}"):
            Loop(from_dict(tree | {"algorithm": algorithm}))


@pytest.mark.parametrize(
    "name, scale", [("flow_grpo", 2), ("tempflow_grpo", 1), ("awm", 1), ("flash_grpo", 2)]
)
def test_blocks_of_prompts_change_no_bit(small, lines, tmp_path, name, scale):
    """Every call has one state here, so that no network sees another batch."""
    found = []
    for size in (None, 1):
        tree = to_dict(small(name, f"by-{size}", max_batch=scale, prompts_per_block=size))
        tree["algorithm"] |= {"guidance_scale": float(scale), "group_size": 4}
        tree["algorithm"] |= {"prompts_per_rollout": 2}
        loop = Loop(from_dict(tree))
        records = loop.step()
        assert all(record["grad_norm"] > 0 for record in records)
        path = written(tmp_path / f"{size}.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        found.append((lines(path), [p.detach().clone() for p in loop.parameters]))
    (records, weights), *others = found
    for also, same in others:
        assert also == records and all(map(torch.equal, same, weights))


def test_ratios_are_means_over_what_was_trained(small):
    """And not over what was left out because it teaches nothing."""
    tree = to_dict(small("dance_grpo"))
    tree["algorithm"] |= {"group_size": 4, "best_of": 2}
    record = Loop(from_dict(tree)).step()[0]
    assert record["ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_a_recipe_of_ones_own_may_sample_with_a_copy(small, tmp_path, monkeypatch):
    """The ratio is then that to the copy, in the first update too."""
    (tmp_path / "trailing.py").write_text(
        "from dataclasses import dataclass\n"
        "from flowkern.rl.algorithms.flow_grpo import FlowGRPO\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Recipe(FlowGRPO):\n"
        "    copies = {'old': lambda n: 0.9}\n"
        "    sampler = 'old'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tree = to_dict(small("flow_grpo", learning_rate=2e-2))
    tree["algorithm"] |= {"name": "trailing:Recipe", "updates_per_rollout": 1}
    loop = Loop(from_dict(tree))
    ratios = [loop.step()[0]["ratio_mean"] for _ in range(3)]
    assert ratios[0] == pytest.approx(1, abs=1e-6) and abs(ratios[2] - 1) > 1e-5
