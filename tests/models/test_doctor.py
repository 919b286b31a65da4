"""What doctor finds in tiny runs: nothing where they are sound, and in each that has a fault, that
fault and no other.
"""

import copy
import json
import os

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("yaml")
import tiny
import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowkern.cli import main
from flowkern.models import chroma, load_model
from flowkern.rollout import Rollout
from flowkern.train import doctor
from flowkern.train.config import from_dict
from flowkern.train.flow import NETWORK
from flowkern.train.loop import Loop

PIXELS, VIDEO = {"height": 32, "width": 32}, {"height": 32, "width": 32, "num_frames": 5}
PROMPTS = ["a red cat", "an old photo of the small blue dog on a seven"]  # of two lengths


def nothing(images, prompts, metadata):
    return torch.zeros(len(images))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """adapter(family, dtype): one that a test may spoil, and where it was loaded from."""
    folders, made = {}, {}

    def of(family, dtype=torch.float32):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            tiny.pipeline(family).save_pretrained(folders[family])
        if (family, dtype) not in made:
            made[family, dtype] = load_model(folders[family], dtype, **size_of(family))
        model = made[family, dtype]
        parts = [part for name, part in model.pipeline.components.items() if name != "transformer"]
        return copy.deepcopy(model, {id(part): part for part in parts}), folders[family]

    return of


def size_of(family):
    return (VIDEO if family == "wan" else PIXELS) | {"max_sequence_length": 32}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """tree(folder, size, ...): a configuration."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def of(folder, model, **algorithm):
        own = {"name": "flow_grpo", "num_inference_steps": 3, "guidance_scale": 2.0}
        own |= {"group_size": 2, "prompts_per_rollout": 2, "updates_per_rollout": 2}
        return {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(folder), **model},
            "data": {"train_prompts": str(tmp_path / "prompts.txt")},
            "reward": {f"{__name__}:nothing": {}},
            "lora": {"rank": 2, "alpha": 4},
            "train": {"steps": 4, "max_batch": 4},
            "algorithm": own | algorithm,
        }

    return of


@pytest.fixture
def loop_of(tree, adapter):
    """loop_of(family, dtype, option=...): a run that has not begun."""

    def of(family, dtype=torch.float32, recomputes=False, **algorithm):
        model, folder = adapter(family, dtype)
        config = size_of(family) | {"gradient_checkpointing": recomputes}
        torch.manual_seed(0)
        return Loop(from_dict(tree(folder, config, **algorithm)), model)

    return of


def found(report):
    return [finding.cause for finding in report.findings]


SOUND = {
    "flux": {"guidance_scale": 1.0, "name": "mixgrpo", "window": 2, "num_inference_steps": 4},
    "qwen_image": {"uncond_gradient": True},
    "wan": {"name": "tempflow_grpo", "num_seeds": 1},
    "sd3": {"name": "flash_grpo", "num_inference_steps": 8},  # each prompt at another step
    "chroma": {"name": "awm", "num_train_timesteps": 2, "guidance_scale": 1.0},
}


@pytest.mark.parametrize("family", SOUND)
def test_a_sound_run_has_no_finding(family, loop_of):
    report = doctor.examine(loop_of(family, **SOUND[family]))
    assert report.is_sound and found(report) == []
    shapes = {"equal", "training", "alone", "mixed"}
    shapes -= {"training"} if SOUND[family].get("name") == "awm" else set()
    assert report.shapes.keys() == shapes
    for level in report.shapes["equal"]:
        assert level.ratio_min == level.ratio_max == 1
        assert level.log_ratio == level.velocity_error == 0
    # Other shapes may be rounded otherwise, on some processors.
    apart = [level for shape in shapes - {"equal"} for level in report.shapes[shape]]
    assert max(level.velocity_error for level in apart) < 1e-4
    # All that is trained; AWM's points are of one depth.
    depths = 1 if family == "chroma" else 2
    assert {len(levels) for levels in report.shapes.values()} == {depths}


# ---- faults at equal batches ----


def dropout(loop, monkeypatch):
    for module in loop.task.model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
            module.train()


class UnderAutocast(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(*inputs, **options)


def autocast(loop, monkeypatch):
    loop.weights.trained[NETWORK] = UnderAutocast(loop.weights.trained[NETWORK])


def checkpointing(loop, monkeypatch):
    """As diffusers 0.42 has it: without the mask in single blocks."""
    monkeypatch.setattr(
        chroma, "recomputed", lambda block, *x, mask: checkpoint(block, *x, use_reentrant=False)
    )


def kernel(loop, monkeypatch):
    """A layer that sums in any order, as atomic additions do, unless it is asked not to."""
    layer = next(m for m in loop.task.model.network.modules() if type(m) is nn.Linear)

    def forward(x):
        if torch.are_deterministic_algorithms_enabled():
            return nn.functional.linear(x, layer.weight, layer.bias)
        order = sorted(range(x.shape[-1]), key=lambda _: os.urandom(4))
        return nn.functional.linear(x[..., order], layer.weight[:, order], layer.bias)

    layer.forward = forward


def latents(loop, monkeypatch):
    record = Rollout.record

    def rounded(self, wave, x):
        record(self, wave, x.to(torch.bfloat16).to(x.dtype))

    monkeypatch.setattr(Rollout, "record", rounded)


def random(loop, monkeypatch):
    """Noise on what goes in, in eval mode too."""
    network = loop.task.model.network

    def noisy(module, inputs, options):
        x = options["hidden_states"]
        return inputs, options | {"hidden_states": x + 1e-3 * torch.randn_like(x)}

    network.register_forward_pre_hook(noisy, with_kwargs=True)


def gradient(loop, monkeypatch):
    network = loop.task.model.network

    def longer(module, inputs, output):
        return (output[0] * 1.01,) if torch.is_grad_enabled() else output

    network.register_forward_hook(longer)


def outputs(network, change):
    """What the network answers, changed."""
    network.register_forward_hook(lambda module, inputs, output: (change(output[0]),))


class Longer(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs, **options):
        return (self.network(*inputs, **options)[0] * 1.01,)


def wrapper(loop, monkeypatch):
    loop.weights.trained[NETWORK] = Longer(loop.weights.trained[NETWORK])


def training_mode(loop, monkeypatch):
    """A step towards the norm of its weights at each call, as spectral normalization makes."""
    layer = loop.task.model.network.get_base_model().proj_out
    nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1)
    layer.train()


def again(loop, monkeypatch):
    """Kernels that are chosen anew at the first call with gradients, and stay."""
    chosen = []

    def answer(velocity):
        if torch.is_grad_enabled():
            chosen.append(True)
        return velocity if chosen else velocity * 1.01

    outputs(loop.task.model.network, answer)


def not_finite(loop, monkeypatch):
    outputs(loop.task.model.network, lambda velocity: velocity * float("nan"))


FAULTS = {
    wrapper: "what training wraps the network in changes it",
    training_mode: "the network is in training mode",
    again: "asked again, is answered the same now, but not as in sampling",
    not_finite: "the velocity of sampling itself is no number",
    dropout: "dropout is on (base_model.model.transformer_blocks.0.attn.to_out.1",
    autocast: "autocast differs: it is off in sampling",
    checkpointing: "with gradient checkpointing the network computes something else",
    kernel: "a kernel is not deterministic",
    latents: "are rounded to bfloat16",
    random: "draws random numbers",
    gradient: "where gradients are on",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_at_equal_batches_is_named_and_no_other(fault, loop_of, monkeypatch):
    is_chroma = fault is checkpointing
    loop = loop_of("chroma" if is_chroma else "flux", recomputes=is_chroma)
    fault(loop, monkeypatch)
    report = doctor.examine(loop)
    assert found(report) == [fault.__name__.replace("_", " ")]
    (finding,) = report.findings
    assert finding.shape == "equal" and finding.log_ratio > 0
    assert finding.share == pytest.approx(finding.log_ratio / 1e-4, rel=1e-3)
    assert FAULTS[fault] in finding.said


def test_two_faults_are_both_named(loop_of, monkeypatch):
    loop = loop_of("flux")
    latents(loop, monkeypatch)
    autocast(loop, monkeypatch)
    assert found(doctor.examine(loop)) == ["autocast", "latents"]


# ---- at other batches only ----


def test_rounding_by_the_shape_of_batches_is_held_against_the_clip_range(loop_of):
    """The same run is sound with the clip range that its latents ask for."""
    loop = loop_of("sd3", torch.bfloat16, clip_range=1e-6)
    report = doctor.examine(loop)
    assert found(report) == ["batch shape"] and report.findings[0].share > doctor.TOLERATED
    assert "bfloat16" in report.findings[0].said
    assert all(level.log_ratio == 0 for level in report.shapes["equal"])
    worst = report.findings[0].log_ratio
    fine = doctor.examine(loop_of("sd3", torch.bfloat16, clip_range=5 * worst))
    assert fine.is_sound


def test_padding_that_changes_from_batch_to_batch_is_named(loop_of, monkeypatch):
    """Text as long as the longest of a call: a row beside a longer one has more tokens."""
    loop = loop_of("wan")
    call = loop.task.model.call

    def as_long_as_the_longest(network, x_t, sigma, parts):
        used = parts["tokens"].abs().amax((0, 2)).nonzero().max() + 1
        return call(network, x_t, sigma, {"tokens": parts["tokens"][:, :used]})

    monkeypatch.setattr(loop.task.model, "call", as_long_as_the_longest)
    report = doctor.examine(loop)
    assert found(report) == ["padding"]
    assert all(level.log_ratio == 0 for level in report.shapes["equal"])


def test_a_row_that_depends_on_the_states_beside_it_is_named(loop_of, monkeypatch):
    """As where a batch is normalized: equal batches are answered equally, others are not."""
    loop = loop_of("flux")
    call = loop.task.model.call

    def beside(network, x_t, sigma, parts):
        return call(network, x_t + 0.1 * x_t.amax(0), sigma, parts)

    monkeypatch.setattr(loop.task.model, "call", beside)
    report = doctor.examine(loop)
    assert found(report) == ["noise levels"] and report.findings[0].share > doctor.TOLERATED
    assert all(level.log_ratio == 0 for level in report.shapes["equal"])


# ---- the command ----


def test_the_command_says_it_in_a_table_and_in_json(tree, adapter, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    _, folder = adapter("flux")
    config.write_text(yaml.safe_dump(tree(folder, PIXELS, guidance_scale=1.0)))
    out = tmp_path / "report.json"
    assert main(["doctor", str(config), "--json", str(out), "--seed", "3"]) == 0
    said = capsys.readouterr().out
    for text in ("FluxPipeline", "256 elements of", "to_q 2", "512 tokens", "OK: the ratio is 1"):
        assert text in said, said
    report = json.loads(out.read_text())
    assert report["is_sound"] and report["findings"] == []
    facts = report["facts"]
    assert facts["elements"] == 256 and facts["lora"]["hits"]["to_q"] == 2
    assert facts["clip_range"] == {
        "configured": 1e-4, "paper": 1e-4, "elements": 65_536,
        "fits": pytest.approx(1e-4 * (65_536 / 256) ** 0.5),
    }  # fmt: skip
    assert set(facts["backends"]) == {"native", "triton", "reference"}
    assert "clip_range: 0.0001 is 0.062 times" in said.replace("\n", " ")
    assert not (tmp_path / "run").exists(), "nothing of the run is written"


def test_where_json_cannot_go_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flowkern.cli.doctor.environment", lambda: pytest.fail("it worked first"))
    for place, why in (
        (tmp_path, "cannot be written: Is a directory"),
        (tmp_path / "none/out.json", "there is no folder"),
        (tmp_path / f"{'n' * 300}.json", "cannot be written: File name too long"),
    ):
        assert main(["doctor", "--json", str(place)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("flowkern: --json: ") and why in said, said
    assert list(tmp_path.iterdir()) == []


def test_without_a_configuration_it_says_what_there_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub/models--a--b").mkdir(parents=True)
    out = tmp_path / "here.json"
    assert main(["doctor", "--json", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    for text in (f"torch {torch.__version__}", "reference", "hub, 1 models", "diffusers 0."):
        assert text in said, said
    assert found["backends"]["cpu"]["reference"] is None
    for name, reason in found["backends"]["cpu"].items():
        assert reason is None or f"no {name}: {reason}" in said, said
    lacking = [n for names in found["packages"].values() for n, v in names.items() if not v]
    assert all(name in said for name in lacking)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "train.steps=3"])
    assert end.value.code == 2 and "expected a CONFIG.yaml" in capsys.readouterr().err


def test_a_run_that_is_off_has_status_1_and_one_that_cannot_be_2(
    tree, adapter, tmp_path, capsys, monkeypatch
):
    config = tmp_path / "config.yaml"
    _, folder = adapter("flux")
    config.write_text(yaml.safe_dump(tree(folder, size_of("flux"))))
    latents(None, monkeypatch)
    assert main(["doctor", str(config)]) == 1
    assert "off: latents, in batches as in sampling" in capsys.readouterr().out
    for wrong, message in (
        ("train.max_batch=1", "train.max_batch: got 1, expected at least 2"),
        ("model.height=33", "model.height: got 33"),
        ("lora.target_modules=[nope]", "'nope' is no layer"),
        ("algorithm.prompts_per_rollout=64", "algorithm.prompts_per_rollout"),
    ):
        assert main(["doctor", str(config), wrong]) == 2
        *progress, error = capsys.readouterr().err.splitlines()
        assert error.startswith("flowkern: ") and message in error
        assert not any("Traceback" in line for line in progress)
