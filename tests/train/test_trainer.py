"""The trainer on the demo model: its laws, its files, its refusals."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from safetensors.torch import load_file

from flowkern.models import Conditioning
from flowkern.rollout import batch
from flowkern.train import checkpoint, metrics, tracking
from flowkern.train import trainer as trainer_module
from flowkern.train.config import ConfigError
from flowkern.train.errors import RunError
from flowkern.train.loading import load_pipeline
from flowkern.train.run import Run
from flowkern.train.trainer import Trainer

EVERY_STEP = {
    "step", "ratio_mean", "pg_clipfrac_higher", "pg_clipfrac_lower", "kl", "grad_norm", "nfe/train",
    "nfe/naive_train", "timing_s/train", "timing_s/step", "memory/peak_gb",
}  # fmt: skip
FIRST_AFTER_ROLLOUT = {
    "reward/mean", "reward/digits_classifier", "reward/digits_judge", "reward/distance_to_real",
    "nfe/sample", "nfe/naive_sample", "timing_s/rollout", "timing_s/reward", "zero_std_ratio",
    "throughput/images_per_s",
}  # fmt: skip


def test_a_run_leaves_its_files_and_exactly_the_agreed_keys(tiny, drawn, capsys):
    config = tiny("algorithm.updates_per_rollout=2")
    assert Trainer(config).run() == 0
    directory = Path(config.output_dir)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for i, record in enumerate(records):
        assert set(record) == EVERY_STEP | (FIRST_AFTER_ROLLOUT if i % 2 == 0 else set())
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
        Trainer(config).run()
    again = tiny("train.overwrite_output_dir=true", "train.steps=1")
    assert Trainer(again).run() == 0
    assert [p.name for p in directory.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("scale, kl_coef, sampled, trained", [(1, 0, 3, 2), (3, 0.01, 6, 8)])
def test_counted_network_rows_are_the_predicted_ones(tiny, scale, kl_coef, sampled, trained):
    trainer = Trainer(tiny(f"algorithm.guidance_scale={scale}", f"algorithm.kl_coef={kl_coef}"))
    first, second = trainer.step()[0], trainer.step()[0]
    for record in (first, second):
        assert record["nfe/sample"] == record["nfe/naive_sample"] == 16 * sampled
        assert record["nfe/train"] == record["nfe/naive_train"] == 16 * trained
    assert first["kl"] == 0, "the adapter starts at zero"
    assert (second["kl"] > 0) == (kl_coef > 0)
    assert first["ratio_mean"] == second["ratio_mean"] == 1, "on policy, exactly"


def test_the_second_update_of_a_rollout_is_off_policy_and_the_first_is_not(tiny):
    trainer = Trainer(tiny("algorithm.updates_per_rollout=2", "train.learning_rate=2e-2"))
    seen = []

    class Watched(type(trainer.objective)):
        def __call__(self, *arguments):
            seen.append(super().__call__(*arguments))
            return seen[-1]

    trainer.objective = Watched(**vars(trainer.objective))
    trainer.step()
    first, second = (seen[i].log_ratio.abs().max().item() for i in (0, 1))
    assert first < 1e-5 < 1e-3 < second


def test_max_batch_changes_nothing_but_rounding(tiny):
    steps = [Trainer(tiny(f"train.max_batch={rows}")).step()[0] for rows in (1000, 5)]
    for key in ("reward/mean", "reward/distance_to_real", "grad_norm", "nfe/train", "nfe/sample"):
        assert steps[0][key] == pytest.approx(steps[1][key], rel=1e-4), key


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny, lines):
    linear = "train.lr_scheduler=linear"
    straight, resumed = tiny(linear, name="straight"), tiny(linear, name="resumed")
    Trainer(straight).run()
    Trainer(resumed).run()
    directory = Path(resumed.output_dir)
    # As a kill in the middle of saving checkpoint-4 leaves it.
    (directory / "checkpoint-4").rename(directory / "checkpoint-4.partial")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    torch.manual_seed(123)
    latest = "train.resume_from_checkpoint=latest"
    assert Trainer(tiny(linear, latest, name="resumed")).run() == 0
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
    directory, trainer = tmp_path / "run", Trainer(tiny())
    run = Run(trainer)
    run.begin()
    for trainer.global_step in (2, 4):
        run.save()
    back = f"train.resume_from_checkpoint={directory / 'checkpoint-2'}"
    other = tmp_path / "other/metrics.jsonl"
    other.parent.mkdir()
    other.write_text('{"step": 9}\n')
    with pytest.raises(ConfigError, match=r"output_dir: .*other.* holds a run already"):
        Run(Trainer(tiny(back, name="other"))).begin()
    assert other.read_text() == '{"step": 9}\n'
    elsewhere = Trainer(tiny(back, name="new"))  # another run's, where there is none yet
    Run(elsewhere).begin()
    assert elsewhere.global_step == 2 and len(checkpoint.checkpoints(directory)) == 2
    Run(Trainer(tiny(back))).begin()
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

    from flowkern.models import load_model

    config = tiny("train.steps=2", "train.learning_rate=2e-2")
    trainer = Trainer(config)
    trainer.run()
    directory, model = Path(config.output_dir) / "checkpoint-2", trainer.model
    conditioning = model.encode(["the digit 3", "a handwritten seven"])
    x_t = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    arguments = (x_t, torch.tensor([0.9, 0.4]), conditioning)
    model.network = trainer.network
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
    with pytest.raises(
        RunError, match="^step 1: reward.report.rewards_of_mine:nan: nan for image 0"
    ):
        Trainer(tiny("reward.report=['rewards_of_mine:nan']", "data.test_prompts=null")).run()
    wrong = tiny("reward.report=['rewards_of_mine:scalar']", name="wrong")
    with pytest.raises(
        RunError, match=r"^validation after step 0: reward\.report\.rewards_of_mine:scalar: .* \(\)"
    ):
        Trainer(wrong).run()
    config = tiny(name="poisoned")
    trainer = Trainer(config)
    trainer.parameters[0].register_hook(lambda gradient: gradient * float("nan"))
    before = trainer.parameters[1].detach().clone()
    with pytest.raises(RunError, match="^step 1: the gradient norm is nan"):
        trainer.run()
    assert torch.equal(trainer.parameters[1], before)
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


def test_prompts_follow_from_seed_and_iteration_and_whole_groups_go_to_a_rank(tiny):
    from flowkern.train.distributed import share
    from flowkern.train.prompts import draw_prompts

    drawn = [tuple(draw_prompts(240, 10, seed, i)) for seed in (0, 1) for i in range(5)]
    assert len(set(drawn)) == 10 and all(len(set(rows)) == 10 for rows in drawn)
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
        ("lora.target_modules=[nope]", "lora.target_modules: .*nope"),
        ("model.max_sequence_length=0", "model.max_sequence_length: got 0, expected 1 to 512"),
        ("output_dir=/dev/null/run", "output_dir: Not a directory: '/dev/null/run'"),
    ],
)
def test_what_only_this_machine_or_the_model_can_refuse_is_refused_by_key(tiny, override, message):
    with pytest.raises(ConfigError, match=f"^{message}") as refused:
        Trainer(tiny(override)).run()
    assert "\n" not in str(refused.value)


def test_the_host_waits_for_no_result_between_the_rewards_and_the_update(tiny, monkeypatch):
    """On a device that keeps no values: what asks for one raises."""
    trainer = Trainer(tiny("algorithm.kl_coef=0.1", "algorithm.guidance_scale=2.0"))
    encode, device = trainer.model.encode, torch.device("meta")

    def encoded(prompts):
        found = encode(prompts)
        return Conditioning(found.tokens.to(device), found.pooled.to(device))

    trainer.network.to(device)
    monkeypatch.setattr(trainer, "device", device)
    monkeypatch.setattr(trainer.model, "encode", encoded)
    rollout = trainer.sample(trainer.draw_prompts())
    assert rollout.latents.device == device
    advantage = torch.randn(1, len(trainer.slots), len(rollout.plan.trained))
    (share,) = trainer.split()
    for site, prompt in trainer.network_calls(rollout.plan, advantage, share):
        rows = batch(rollout, site, share[prompt], advantage[0])
        out = trainer.objective(rows, trainer.learn, trainer.anchors())
        trainer.accelerator.backward(out.loss)
        assert metrics.summed(out).device == device


def test_a_model_in_memory_takes_the_place_of_a_directory(tiny, monkeypatch):
    config = tiny()
    model = load_pipeline(config, "cpu")
    monkeypatch.setattr(trainer_module, "load_pipeline", None)
    trainer = Trainer(config, model)
    assert trainer.model is model and trainer.step()[0]["ratio_mean"] == 1
