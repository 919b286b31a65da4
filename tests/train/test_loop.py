"""The loop on the demo model: its laws, its files, its refusals."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from safetensors.torch import load_file

from flowkern.models import Guidance, load_model
from flowkern.train import checkpoint, flow, metrics, tracking
from flowkern.train.config import ConfigError
from flowkern.train.errors import RunError
from flowkern.train.loading import load_pipeline
from flowkern.train.loop import Loop

DIGITS = Path(__file__).resolve().parents[2] / "assets/digits-sd3"
EVERY_STEP = {
    "step", "loss", "lr",
    "ratio_mean", "pg_clipfrac_higher", "pg_clipfrac_lower", "kl", "grad_norm", "nfe/train",
    "nfe/naive_train", "timing_s/train", "timing_s/step", "memory/peak_gb",
}  # fmt: skip
FIRST_AFTER_ROLLOUT = {
    "reward/mean", "reward/digits_classifier", "reward/digits_judge", "reward/distance_to_real",
    "nfe/sample", "nfe/naive_sample", "timing_s/rollout", "timing_s/reward", "zero_std_ratio",
    "group_std", "adv_clip_ratio", "replay/log_ratio", "replay/off",
    "throughput/images_per_s",
}  # fmt: skip


def test_a_run_leaves_its_files_and_exactly_the_agreed_keys(tiny, drawn, capsys):
    config = tiny("algorithm.updates_per_rollout=2")
    assert Loop(config).run() == 0
    directory = Path(config.output_dir)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for i, record in enumerate(records):
        levels = {key for key in record if re.fullmatch(r"(ratio_mean|pg_clipfrac)/[01]\.\d+", key)}
        assert set(record) - levels == EVERY_STEP | (FIRST_AFTER_ROLLOUT if i % 2 == 0 else set())
        assert len(levels) == (0 if i % 2 == 0 else 2 * 2), "two levels are trained"
        parts = ("timing_s/rollout", "timing_s/reward", "timing_s/train")
        total = sum(record.get(part, 0) for part in parts)
        assert record["timing_s/step"] == pytest.approx(total)
    for name in ("samples/step-0.png", "samples/step-4.png", "reward_curve.png"):
        assert (directory / name).read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in directory.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert not list(directory.rglob("*.partial")), "nothing half-written stays"
    assert "done: 4 steps" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"output_dir: .* holds a run already; .*latest"):
        Loop(config).run()
    again = tiny("train.overwrite_output_dir=true", "train.steps=1")
    assert Loop(again).run() == 0
    assert [p.name for p in directory.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("scale, kl_coef, sampled, trained", [(1, 0, 3, 2), (3, 0.01, 6, 8)])
def test_counted_network_calls_are_the_predicted_ones(tiny, scale, kl_coef, sampled, trained):
    """The unconditional half of two steps is the one that sampling kept."""
    loop = Loop(tiny(f"algorithm.guidance_scale={scale}", f"algorithm.kl_coef={kl_coef}"))
    first, second = loop.step()[0], loop.step()[0]
    for record in (first, second):
        assert record["nfe/sample"] == record["nfe/naive_sample"] == 16 * sampled
        assert record["nfe/naive_train"] == 16 * trained
        assert record["nfe/train"] == 16 * (trained - 2 * (scale > 1))
    assert first["kl"] == 0, "the adapter starts at zero"
    assert (second["kl"] > 0) == (kl_coef > 0)
    assert first["ratio_mean"] == second["ratio_mean"] == 1, "on policy, exactly"


def test_the_second_update_of_a_rollout_is_off_policy_and_the_first_is_not(tiny):
    loop = Loop(tiny("algorithm.updates_per_rollout=2", "train.learning_rate=2e-2"))
    seen = []

    class Watched(type(loop.task.objective)):
        def __call__(self, *arguments):
            seen.append(super().__call__(*arguments))
            return seen[-1]

    loop.task.objective = Watched(**vars(loop.task.objective))
    loop.step()
    first, second = (seen[i].statistics["ratio_mean"].log().abs().max().item() for i in (0, 1))
    assert first == 0 and second > 1e-3


def test_max_batch_changes_nothing_but_rounding(tiny):
    steps = [Loop(tiny(f"train.max_batch={size}")).step()[0] for size in (1000, 5)]
    for key in ("reward/mean", "reward/distance_to_real", "grad_norm", "nfe/train", "nfe/sample"):
        assert steps[0][key] == pytest.approx(steps[1][key], rel=1e-4), key


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny, lines):
    linear = "train.lr_scheduler=linear"
    straight, resumed = tiny(linear, name="straight"), tiny(linear, name="resumed")
    Loop(straight).run()
    Loop(resumed).run()
    directory = Path(resumed.output_dir)
    # As a kill in the middle of saving checkpoint-4 leaves it.
    (directory / "checkpoint-4").rename(directory / "checkpoint-4.partial")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    torch.manual_seed(123)
    latest = "train.resume_from_checkpoint=latest"
    assert Loop(tiny(linear, latest, name="resumed")).run() == 0
    for name in ("metrics.jsonl", "validation.jsonl"):
        expected = lines(Path(straight.output_dir) / name)
        assert lines(directory / name) == expected and len(expected) >= 2
    one, two = (Path(c.output_dir) / "checkpoint-4" for c in (straight, resumed))
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        # Not the files' bytes: the order of the metadata in a header is drawn by lot.
        expected, found = load_file(one / name), load_file(two / name)
        assert expected.keys() == found.keys() and len(expected) > 0
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    states = [torch.load(path / "state.pt", weights_only=True) for path in (one, two)]
    assert states[0]["step"] == states[1]["step"] == 4
    for key, moments in states[0]["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, states[1]["optimizer"]["state"][key][name])


def test_a_run_resumed_earlier_drops_the_branch_it_leaves(tiny, tmp_path):
    directory, loop = tmp_path / "run", Loop(tiny())
    loop.begin()
    for loop.global_step in (2, 4):
        loop.checkpoint()
    back = f"train.resume_from_checkpoint={directory / 'checkpoint-2'}"
    other = tmp_path / "other/metrics.jsonl"
    other.parent.mkdir()
    other.write_text('{"step": 9}\n')
    with pytest.raises(ConfigError, match=r"output_dir: .*other.* holds a run already"):
        Loop(tiny(back, name="other")).begin()
    assert other.read_text() == '{"step": 9}\n'
    elsewhere = Loop(tiny(back, name="new"))  # another run's, where there is none yet
    elsewhere.begin()
    assert elsewhere.global_step == 2 and len(checkpoint.checkpoints(directory)) == 2
    Loop(tiny(back)).begin()
    assert checkpoint.checkpoints(directory) == [directory / "checkpoint-2"]


def test_what_was_just_committed_is_never_deleted(tmp_path):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    final = checkpoint.write(tmp_path, 3, lambda directory: None, limit=1)
    assert final == tmp_path / "checkpoint-3" and final.is_dir()
    assert not (tmp_path / "checkpoint-2").exists()


def test_curves_of_a_run_resumed_with_other_rewards(tmp_path):
    records = [{"step": 1, "reward/mean": 0.1, "reward/a": 0.1}, {"step": 2, "kl": 0.0}]
    records.append({"step": 3, "reward/mean": 0.2, "reward/b": 7.0})
    records.append({"step": 4, "reward/mean": None, "reward/b": "a note", "reward/c": 10**400})
    tracking.save_curves(tmp_path / "curve.png", records, [{"step": 0, "reward/a": 0.3}], ["a"])
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_checkpoint_loads_in_diffusers_and_in_peft(tiny):
    from diffusers import StableDiffusion3Pipeline
    from peft import PeftModel

    config = tiny("train.steps=2", "train.learning_rate=2e-2")
    loop = Loop(config)
    loop.run()
    directory, model = Path(config.output_dir) / "checkpoint-2", loop.task.model
    conditioning = load_model(config.model.path).encode(["the digit 3", "a handwritten seven"])
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    arguments = (x_t, torch.tensor([0.9, 0.4]), conditioning)
    model.network = loop.task.model.network
    with torch.no_grad():
        expected = model.velocity(*arguments)
        base = load_model(config.model.path)
        plain = base.velocity(*arguments)
        pipeline = StableDiffusion3Pipeline.from_pretrained(config.model.path)
        pipeline.load_lora_weights(directory)
        base.network = pipeline.transformer
        through_diffusers = base.velocity(*arguments)
        base = load_model(config.model.path)
        base.network = PeftModel.from_pretrained(base.network, directory)
        through_peft = base.velocity(*arguments)
    assert (expected - plain).abs().max() > 1e-2, "training moved it"
    torch.testing.assert_close(through_diffusers, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(through_peft, expected, rtol=0, atol=1e-6)


def test_what_is_not_finite_stops_the_run_before_the_weights_move(tiny, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(
        "import torch\n"
        "def nan(images, prompts, metadata):\n"
        "    return torch.full((len(images),), float('nan'))\n"
        "def scalar(images, prompts, metadata):\n"
        "    return images.mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match="^step 1: reward.rewards_of_mine:nan: nan for image 0"):
        Loop(tiny("reward.rewards_of_mine:nan={weight: 0}", "data.test_prompts=null")).run()
    wrong = tiny("reward.rewards_of_mine:scalar={weight: 0}", name="wrong")
    with pytest.raises(
        RunError, match=r"^validation after step 0: reward\.rewards_of_mine:scalar: .* \(\)"
    ):
        Loop(wrong).run()
    config = tiny(name="poisoned")
    loop = Loop(config)
    loop.parameters[0].register_hook(lambda gradient: gradient * float("nan"))
    before = loop.parameters[1].detach().clone()
    with pytest.raises(RunError, match="^step 1: the gradient norm is nan"):
        loop.run()
    assert torch.equal(loop.parameters[1], before)
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


def test_prompts_follow_from_seed_and_iteration_and_whole_groups_go_to_a_rank(tiny):
    from flowkern.train.distributed import share
    from flowkern.train.prompts import draw_prompts

    drawn = [tuple(draw_prompts(240, 10, seed, i)) for seed in (0, 1) for i in range(5)]
    assert len(set(drawn)) == 10 and all(len(set(places)) == 10 for places in drawn)
    assert drawn[3] == tuple(draw_prompts(240, 10, 0, 3))
    for world in (1, 2, 3):
        slots = torch.stack([share(12, rank, world, 2).view(2, -1) for rank in range(world)])
        by_update = slots.transpose(0, 1).flatten(1).sort().values
        assert torch.equal(by_update, torch.arange(12).view(2, 6)), "the same for any world"
    with pytest.raises(ValueError, match="prompts_per_rollout: got 10, expected a multiple of 3"):
        share(10, 0, 3, 1)


@pytest.mark.parametrize(
    "override, message",
    [
        ("algorithm.prompts_per_rollout=241", "algorithm.prompts_per_rollout: got 241, .* the 240"),
        ("train.report_to=nope", "train.report_to: got 'nope', expected one of .*tensorboard"),
        ("train.report_to=clearml", "train.report_to: 'clearml' is not .*: pip install clearml"),
        ("lora.target_modules=[nope]", "lora.target_modules: .*nope"),
        (
            "lora.target_modules=[norm1]",
            "lora.target_modules: 'norm1' is also transf.*norm1, a Ada.*; expected linear ones",
        ),
        ("model.max_sequence_length=0", "model.max_sequence_length: got 0, expected 1 to 512"),
        ("model.guidance_embedding=3.5", "model.guidance_embedding: got 3.5, but .* takes height"),
        ("model.frame_rate=24", "model.frame_rate: got 24.0, but .* takes height, width"),
        (
            "model.revision=main",
            "model.revision: got 'main', but .* is a directory; expected an id",
        ),
        ("output_dir=/dev/null/run", "output_dir: '/dev/null' is no directory"),
    ],
)
def test_what_only_this_machine_or_the_model_can_refuse_is_refused_by_key(tiny, override, message):
    with pytest.raises(ConfigError, match=f"^{message}") as refused:
        Loop(tiny(override)).run()
    assert "\n" not in str(refused.value)


def test_the_host_waits_for_no_result_between_the_rewards_and_the_update(tiny, monkeypatch):
    """On a device that keeps no values: what asks for one raises."""
    loop = Loop(tiny("algorithm.kl_coef=0.1", "algorithm.guidance_scale=2.0"))
    device = torch.device("meta")
    loop.task.model.network.to(device)
    monkeypatch.setattr(loop.task, "device", device)
    prompts = loop.task.draw_prompts(0)
    texts = [*(row["prompt"] for row in prompts), ""]
    conditioning = loop.task.model.encode(texts).to(device)
    blocks = loop.task.sample(0, conditioning)
    ((_, leaves),) = blocks
    rollout = blocks.rollout
    assert leaves.device == device and rollout.latents is None
    advantage = torch.randn(1, len(prompts), len(rollout.plan.trained))
    figures = {"figures": {}, "every": {}, "laps": None, "samples": 16, "unit": "images"}
    parts = {"rollout": rollout, "conditioning": conditioning, "advantage": advantage}
    sums = metrics.Sums()
    for batch in loop.task.batches(flow.FlowExperience(**figures, **parts), 0):
        out = loop.task.loss(batch, loop.weights)
        loop.accelerator.backward(out.loss / batch.total)
        sums.add(out)
    assert sums.over(batch.total).device == device


def test_a_model_in_memory_takes_the_place_of_a_directory(tiny, monkeypatch):
    config = tiny()
    model = load_pipeline(config, "cpu")
    monkeypatch.setattr(flow, "load_pipeline", None)
    loop = Loop(config, model)
    assert loop.task.model is model and loop.step()[0]["ratio_mean"] == 1
    model = SimpleNamespace(guidance=Guidance("none"))
    for section in ("algorithm", "validation"):
        message = f"^{section}.guidance_scale: got 3.0, .* takes no guidance$"
        with pytest.raises(ConfigError, match=message):
            Loop(tiny(f"{section}.guidance_scale=3"), model)
    both = tiny("algorithm.guidance_scale=3", "algorithm.uncond_gradient=true", "train.max_batch=1")
    with pytest.raises(ConfigError, match="^train.max_batch: got 1, expected at least 2: both hal"):
        Loop(both, SimpleNamespace(guidance=Guidance("cfg")))


TOY = """
from dataclasses import dataclass
import torch
from flowkern.rl.algorithms.flow_grpo import FlowGRPO as Base
from flowkern.rl.objectives import Outcome
from flowkern.train.distributed import Laps
from flowkern.train.loop import Batch
from flowkern.train.metrics import Experience

@dataclass(frozen=True, kw_only=True)
class Recipe(Base):
    task = "toy:Line"

@dataclass(frozen=True)
class Rows(Batch):
    x: torch.Tensor

class Line:
    facts, copies = ("draws a line",), ()

    def __init__(self, config, accelerator, stop, model):
        torch.manual_seed(config.seed)
        self.line, self.calls = torch.nn.Linear(3, 1), 0

    def modules(self):
        return {"line": self.line}

    def begin(self, iteration):
        self.first = iteration

    def collect(self, iteration):
        assert iteration >= self.first
        laps = Laps(torch.device("cpu"), lambda: self.calls)
        self.calls += 5
        laps.mark(), laps.mark()
        return Experience({"reward/mean": float(iteration)}, {}, laps, 8, "lines")

    def batches(self, experience, update):
        return [Rows(8, True, torch.full((4, 3), float(i + update))) for i in range(2)]

    def loss(self, batch, weights):
        self.calls += 4
        error = (weights.trained["line"](batch.x).squeeze(1) - 1).square()
        return Outcome(error.sum(), {"error": error.detach()})

    def evaluate(self, step):
        return {"bias": self.line.bias.item()}

    def save(self, directory):
        directory.mkdir(exist_ok=True)
        torch.save(self.line.state_dict(), directory / "line.pt")

    def load(self, directory):
        self.line.load_state_dict(torch.load(directory / "line.pt", weights_only=True))
"""


def test_the_loop_trains_whatever_a_task_makes_of_it(tiny, tmp_path, monkeypatch, lines):
    """A task without images, prompts, a model or a plan; it is resumed as any other."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    options = ("algorithm.updates_per_rollout=2", "train.ema_decay=0.5", "validation.steps=2")
    options += ("algorithm.name=toy:Recipe",)
    for name, until in (("straight", 4), ("resumed", 2)):
        assert Loop(tiny(*options, f"train.steps={until}", name=name)).run() == 0
    latest = "train.resume_from_checkpoint=latest"
    assert Loop(tiny(*options, latest, name="resumed")).run() == 0
    one, two = tmp_path / "straight", tmp_path / "resumed"
    records = lines(one / "metrics.jsonl")
    assert records == lines(two / "metrics.jsonl") and len(records) == 4
    names = "step loss error grad_norm lr reward/mean nfe/sample nfe/train"
    assert list(records[0]) == names.split()
    assert records[0]["nfe/sample"] == 5 and records[3]["nfe/train"] == 8
    assert records[2]["error"] < records[0]["error"]
    held_out = lines(one / "validation.jsonl")
    assert held_out == lines(two / "validation.jsonl") and [r["step"] for r in held_out] == [
        0,
        2,
        4,
    ]
    for file in ("line.pt", "ema/line.pt"):
        a, b = (torch.load(p / "checkpoint-4" / file, weights_only=True) for p in (one, two))
        assert all(torch.equal(value, b[name]) for name, value in a.items())
