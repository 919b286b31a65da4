"""The estimate of doctor: kernels counted by hand, sizes as loaded, and what was measured on an
H200.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("yaml")
import tiny
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowkern.cli import main
from flowkern.models import load_model
from flowkern.models.on_meta import on_meta
from flowkern.train import tree
from flowkern.train.cards import CARDS
from flowkern.train.config import load_config
from flowkern.train.dry_run import dry_run, dry_run_of_blocks
from flowkern.train.estimate import _Run
from flowkern.train.parts import held

ROOT = Path(__file__).parents[2]
H200 = ROOT / "benchmarks/results/nvidia-h200"
EVERY = os.environ.get("FLOWKERN_EVERY_CELL") == "1"
BF16 = {"default": torch.bfloat16, "network": torch.bfloat16, "vae": torch.float32}


# ---- a dry run ----


def test_a_linear_layer_by_hand():
    layer, x = nn.Linear(32, 64, bias=False, device="meta"), torch.empty(8, 32, device="meta")
    forward = dry_run(lambda: layer(x))
    assert forward.operations == 2 * 8 * 32 * 64
    assert forward.peak == 4 * 8 * 64
    ((kernel, count),) = forward.kernels.items()
    assert count == 1 and kernel.bytes == 4 * (8 * 32 + 32 * 64 + 8 * 64)
    x.requires_grad_(True)
    assert dry_run(lambda: layer(x).sum().backward()).operations == 3 * forward.operations
    layer.requires_grad_(False)  # as under an adapter
    assert dry_run(lambda: layer(x).sum().backward()).operations == 2 * forward.operations


@pytest.mark.parametrize(
    "dtype, is_exact, kept", [(None, False, 4), ("bf16", False, 2), ("bf16", True, 8)]
)
def test_a_norm_of_squares_keeps_what_came_in(dtype, is_exact, kept, monkeypatch):
    """Bytes of an element beside what comes in and what comes out: in 32 bits both, where autocast
    has it so, in which case what came in is another, too."""
    monkeypatch.setattr("flowkern.train.dry_run.HAS_EXACT_RMS", is_exact)
    dtype = torch.bfloat16 if dtype else None
    norm = nn.RMSNorm(64, device="meta", dtype=dtype)
    x = torch.empty(4096, 64, device="meta", dtype=dtype, requires_grad=True)
    found = dry_run(lambda: norm(x), dtype)
    assert found.peak == pytest.approx(kept * 4096 * 64, rel=0.15)  # scales of rows, too
    assert sum(found.kernels.values()) == (3 if is_exact else 1)


def test_attention_keeps_no_scores_and_autocast_narrows():
    q = torch.empty(1, 2, 4096, 64, device="meta", requires_grad=True)
    found = dry_run(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    forward = 2 * 2 * (2 * 4096 * 4096 * 64)
    assert found.operations == 3 * forward
    assert found.peak < 4 * 2 * 4096 * 4096  # the scores
    scores = dry_run(
        lambda: F.scaled_dot_product_attention(q, q, q).sum().backward(), keeps_scores=True
    )
    assert scores.operations == found.operations
    assert scores.peak > 4 * 2 * 4096 * 4096
    layer, x = nn.Linear(32, 64, device="meta"), torch.empty(8, 32, device="meta")
    with torch.no_grad():
        wide, narrow = (dry_run(lambda: layer(x), d) for d in (None, torch.bfloat16))
        norm = dry_run(lambda: F.layer_norm(x.bfloat16(), (32,)), torch.bfloat16)
    assert wide.operations == narrow.operations
    assert narrow.peak == 2 * (8 * 32 + 32 * 64 + 64 + 8 * 64)  # a copy of each in 16 bits
    assert norm.peak >= 2 * 8 * 32 + 2 * 4 * 8 * 32  # x, x in float32, and its norm


class Blocks(nn.Module):
    """Two sorts of blocks, in one list."""

    def __init__(self, is_checkpointed):
        super().__init__()
        sizes = [64, 64, 64, 96, 96]
        made = [nn.Sequential(nn.Linear(16, n), nn.GELU(), nn.Linear(n, 16)) for n in sizes]
        self.blocks, self.is_checkpointed = nn.ModuleList(made), is_checkpointed

    def forward(self, x):
        for block in self.blocks:
            ask = self.is_checkpointed and torch.is_grad_enabled()
            x = x + (checkpoint(block, x, use_reentrant=False) if ask else block(x))
        return x


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_blocks_that_repeat_are_as_the_whole(is_checkpointed, dtype):
    with torch.device("meta"):
        network, x = Blocks(is_checkpointed), torch.empty(4, 256, 16)
    for weight in network.parameters():
        weight.grad = torch.empty_like(weight)

    def ask():
        network(x).sum().backward()

    whole = dry_run(ask, dtype)
    few = dry_run_of_blocks(network, list(network.blocks), ask, dtype)
    assert {k: n for k, n in few.kernels.items() if n} == dict(whole.kernels)
    assert few.peak == pytest.approx(whole.peak, rel=0.05)
    assert len(network.blocks) == 5
    forward = 2 * 4 * 256 * 16 * 2 * (3 * 64 + 2 * 96)
    first = 2 * 4 * 256 * 16 * 64  # x learns nothing
    again = forward - 2 * 4 * 256 * 16 * (3 * 64 + 2 * 96) if is_checkpointed else 0
    assert whole.operations == pytest.approx(3 * forward - first + again, rel=0.2 * is_checkpointed)


# ---- sizes ----


@pytest.mark.parametrize("family", tiny.PIPELINES if EVERY else ["sd3", "hunyuan_video"])
def test_sizes_are_those_of_what_is_loaded(family, tmp_path):
    """T5's words are one table for its two layers, Qwen's the first and the last layer."""
    tiny.pipeline(family).save_pretrained(tmp_path)
    options = {"height": 32, "width": 32}
    loaded = load_model(tmp_path, BF16 | {"default": torch.bfloat16}, **options)
    empty = on_meta(tmp_path, BF16, None, **options)
    assert empty.latent_shape == loaded.latent_shape
    for name, part in loaded.pipeline.components.items():
        if isinstance(part, nn.Module):
            mine = empty.pipeline.components[name]
            assert sizes(mine) == sizes(part), name
            assert all(p.is_meta for p in mine.parameters())
    rows = loaded.encode(["a red cat"]).parts
    assert {n: p.shape for n, p in empty.blank().items()} == {n: p.shape for n, p in rows.items()}
    kinds = {n: p.is_floating_point() or p.dtype for n, p in rows.items()}
    assert {n: p.is_floating_point() or p.dtype for n, p in empty.blank().items()} == kinds


def sizes(module):
    return {name: (p.shape, p.dtype) for name, p in module.named_parameters()}


BILLIONS = {
    "stabilityai/stable-diffusion-3.5-medium": (2.243, 5.581, 0.084),
    "stabilityai/stable-diffusion-3.5-large": (8.057, 5.581, 0.084),
    "black-forest-labs/FLUX.1-dev": (11.901, 4.886, 0.084),
    "black-forest-labs/FLUX.2-klein-base-4B": (3.876, 4.022, 0.084),
    "black-forest-labs/FLUX.2-klein-base-9B": (9.079, 8.191, 0.084),
    "black-forest-labs/FLUX.2-dev": (32.223, 24.011, 0.084),
    "lodestones/Chroma1-HD": (8.900, 4.762, 0.084),
    "Lightricks/LTX-Video": (1.923, 4.762, 0.419),
    "hunyuanvideo-community/HunyuanVideo": (12.821, 7.628, 0.246),
    "Qwen/Qwen-Image": (20.430, 8.292, 0.127),
    "Tongyi-MAI/Z-Image": (6.155, 4.022, 0.084),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (1.419, 5.681, 0.127),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (5.000, 5.681, 0.705),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (14.288, 5.681, 0.127),
}
"""Of the transformer, the text encoders, the VAE; tied words counted once."""


@pytest.mark.parametrize("name", BILLIONS if EVERY else [*BILLIONS][:1])
def test_published_sizes(name):
    pipeline = on_meta(name, BF16).pipeline
    modules = {n: p for n, p in pipeline.components.items() if isinstance(p, nn.Module)}
    counts = {n: sum(p.numel() for p in part.parameters()) / 1e9 for n, part in modules.items()}
    encoders = sum(count for part, count in counts.items() if "encoder" in part)
    found = counts["transformer"], encoders, counts["vae"]
    assert found == pytest.approx(BILLIONS[name], abs=0.0011)


# ---- what was measured ----


def config_of(model, *overrides):
    """As benchmarks/train_step.py has it."""
    tree = ROOT / "configs/models" / f"{model}.yaml"
    algorithm = "{name: flow_grpo, group_size: 8, prompts_per_rollout: 1, updates_per_rollout: 1}"
    given = [
        "output_dir=run", "data.train_prompts=prompts.txt", f"algorithm={algorithm}",
        "algorithm.num_inference_steps=10", "algorithm.guidance_scale=4.5",
        "algorithm.kl_coef=0.004", "reward={digits_classifier: {}}", "train.steps=1",
    ]  # fmt: skip
    return load_config(tree, [*given, *overrides])


@pytest.fixture
def torch_2_11(monkeypatch):
    """As measured: its autocast leaves nn.RMSNorm in 16 bits."""
    monkeypatch.setattr("flowkern.train.dry_run.HAS_EXACT_RMS", False)


def test_stable_diffusion_is_what_was_measured(torch_2_11):
    """Peaks within 3 %, seconds within a tenth, rows and operations exactly."""
    rows = json.loads((H200 / "train_step.json").read_text())["rollouts"]
    (measured,) = [r for r in rows if r["way"] == "c" and r["rollout"] == 1]
    run = _Run(config_of("sd35_medium"))
    found = run.estimate(CARDS["h200"])
    asked = {kind: measured["rows"][kind] for kind in ("sampling", "learning", "not learning")}
    assert {kind: found.rows[kind] for kind in asked} == asked
    assert found.tflop == pytest.approx(measured["model_tflop"], rel=1e-3)
    assert found.peak / 1e9 == pytest.approx(measured["peak_memory_gb"], rel=0.03)
    assert found.seconds["iteration"] == pytest.approx(measured["seconds"], rel=0.1)
    # 17.1 GB with calls of four rows: docs/gpu.md.
    rest = found.peak - found.memory["a call of training"]
    assert (rest + run.call(4, True, False).peak) / 1e9 == pytest.approx(17.1, rel=0.03)


def test_flux_is_what_was_measured(torch_2_11):
    """A call of two rows, forward and backward, eager: 44.1 GB, 406 ms; the frozen weights' GB as
    docs/models.md has them. In the process that measured there was a network of two blocks of each
    sort beside it, for which blocks had been compiled, and a copy of the gradient."""
    cases = json.loads((H200 / "network.json").read_text())
    measured = cases["flux compiled, emulated casts"]["eager bfloat16"]
    run = _Run(config_of("flux1_dev", "algorithm.guidance_scale=1"))
    taken, trained = run.call(2, True, False), sum(weight.nbytes for weight in run.weights)
    base = run.model.network.get_base_model()
    left = [*base.transformer_blocks[2:], *base.single_transformer_blocks[2:]]
    left = sum(p.nbytes for block in left for p in block.parameters())
    beside = run.held.frozen + trained - left
    peak = run.held.frozen + trained + taken.peak + beside + trained
    assert peak / 1e9 == pytest.approx(measured["both_peak_gb"], rel=0.01)
    seconds = CARDS["h200"].seconds(taken)
    assert 1e3 * seconds == pytest.approx(measured["both_2_ms"], rel=0.1)
    for kind, kept in {None: 23.8, "float8": 23.8, "int8": 12.0, "nf4": 6.8}.items():
        model = run.config.model.model_copy(update={"quantization": kind})
        config = run.config.model_copy(update={"model": model})
        assert round(held(config, run.model.network, run.blocks, 1).frozen / 1e9, 1) == kept


def test_a_video_is_what_was_measured(torch_2_11):
    """A row of Wan, forward and backward, eager: 38.9 GB, 561 ms; checkpointed 6.1 GB."""
    measured = json.loads((H200 / "network.json").read_text())["wan"]
    size = "model.height=480", "model.width=832", "model.num_frames=33"
    run = _Run(config_of("wan21_1.3b", *size))
    kept = run.held.frozen + sum(weight.nbytes for weight in run.weights)
    taken = run.call(1, True, False)
    assert 1e3 * CARDS["h200"].seconds(taken) == pytest.approx(measured["eager"]["both_1_ms"], 0.1)
    for way, call in ("eager", taken), ("checkpointing", run.call(1, True, True)):
        peak = (kept + call.peak) / 1e9
        assert peak == pytest.approx(measured[way]["both_peak_gb"], rel=0.015)


# ---- the command ----


def test_the_command(tmp_path, capsys, monkeypatch):
    tiny.pipeline("sd3").save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    path = tmp_path / "found.json"
    flags = ["--estimate", "--json", str(path)]
    config = [
        str(ROOT / "configs/digits/flow_grpo.yaml"), f"model.path={tmp_path / 'model'}",
        "model.height=64", "model.width=64", "algorithm.kl_coef=0.1", "lora.target_modules=null",
    ]  # fmt: skip
    assert main(["doctor", *config, *flags, "--card", "h200"]) == 0
    said, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "fits: " in said and "assumed: 989 TFLOP/s" in said
    assert found["peak"] == max(found["phases"].values())
    assert found["memory"]["optimizer"] == 2 * found["memory"]["trained weights"]
    assert found["seconds"]["iteration"] > 0
    assert main(["doctor", *config, *flags, "lora=null"]) == 0
    whole = json.loads(path.read_text())["memory"]
    parts = "trained weights", "gradients", "optimizer", "copies of trained weights"
    assert sum(whole[part] for part in parts) == 5 * 4 * found["facts"]["parameters"]
    split = "train.sharding=fsdp2", "lora=null", "--processes", "2"
    assert main(["doctor", *config, *flags, *split, "train.rollout_unshard=true"]) == 0
    half = json.loads(path.read_text())
    for part in parts:
        assert half["memory"][part] == pytest.approx(whole[part] / 2, rel=0.02)
    assert half["memory"]["gathered weights"] == whole["trained weights"]
    assert half["rows"]["images"] == found["rows"]["images"] / 2
    assert "processes   2, fsdp2" in capsys.readouterr().out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for arguments, message in [
        ([*config, "train.sharding=fsdp2", "--estimate"], "expected --processes N beside it"),
        ([*config, *split, "--estimate", "train.optimizer=adamw_8bit"], "it takes whole weights"),
        ([*config, "train.sharding=hsdp", "--estimate", "--processes", "4"], "(LOCAL_WORLD_SIZE)"),
        ([*config, "--estimate", "--processes", "7"], "expected a multiple of 7 processes x"),
        ([*config, "--processes", "2"], "--processes: expected --estimate beside it"),
        ([*config, "model.path=nobody/nothing", "--estimate"], "model.path: 'nobody/nothing' is"),
        ([*config, "--estimate", "--card", "abacus"], "--card: got 'abacus', expected one of"),
        ([*config, "model.attention_backend=flish", "--estimate"], "model.attention_backend: got"),
        ([*config, "lora=null", "model.quantization=int8", "--estimate"], "but lora is null"),
        ([*config, "--estimate", "--card", "RTX-4090"], "did you mean 'rtx4090'?"),
        ([*config, "--card", "h200"], "--card: expected --estimate beside it"),
    ]:
        assert main(["doctor", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    monkeypatch.setitem(CARDS, "abacus", CARDS["h200"].__class__(1e-3, 1, 1, "beads"))
    assert main(["doctor", *config, "--estimate", "--card", "abacus"]) == 1
    assert "too large: " in capsys.readouterr().out


# ---- configs/hardware ----

RUNS = {"flow_grpo_sd35m_geneval": (24, 48, 80, 141), "flow_grpo_flux_pickscore": (48, 80, 141)}
"""The runs of configs/papers that each card's file is said to be for."""


def on_card(run, card):
    rewards = tree.read([ROOT / f"configs/papers/{run}.yaml"])["reward"]
    files = [ROOT / f"configs/papers/{run}.yaml", ROOT / f"configs/hardware/{card}gb.yaml"]
    return load_config(files, [f"reward.{name}.kind=mine:Reward" for name in rewards])


def test_every_card_has_its_file():
    """It composes with the runs that it is for, and says of each what is estimated."""
    files = {
        int(path.stem.removesuffix("gb")): path for path in (ROOT / "configs/hardware").glob("*")
    }
    assert sorted(files) == sorted({card for cards in RUNS.values() for card in cards})
    for run, cards in RUNS.items():
        for card in cards:
            own = on_card(run, card)
            assert own.train.max_batch == tree.read([files[card]])["train"]["max_batch"]
            assert run in files[card].read_text()


@pytest.mark.skipif(not EVERY, reason="FLOWKERN_EVERY_CELL=1: a minute")
@pytest.mark.parametrize("run, card", [(run, card) for run in RUNS for card in RUNS[run]])
def test_a_file_of_hardware_fits_its_card(run, card):
    found = _Run(on_card(run, card)).estimate(None)
    assert found.peak <= 0.9 * card * 1e9
    said = (ROOT / f"configs/hardware/{card}gb.yaml").read_text().replace("\n# ", " ")
    peaks = {found.peak, max(v for k, v in found.phases.items() if k != "encoding prompts")}
    told = re.search(rf"{run}[^(]*?([\d.]+)( GB|\s\()", said)[1]
    assert float(told) in {round(peak / 1e9, 1) for peak in peaks}


@pytest.mark.skipif(not EVERY, reason="FLOWKERN_EVERY_CELL=1: minutes")
def test_the_table_of_what_fits_is_what_its_command_writes():
    done = subprocess.run([sys.executable, ROOT / "scripts/what_fits.py", "--check"], cwd=ROOT)
    assert done.returncode == 0
