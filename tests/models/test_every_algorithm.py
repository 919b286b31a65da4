"""Every algorithm on every family, on tiny pipelines through the loop: what is trained is finite,
begins on policy, costs what its plan says, and in bfloat16 is near what it is in float32.

The suite has cells in which each algorithm and each family comes, in bfloat16 too;
FLOWKERN_EVERY_CELL=1 has all of them.
"""

import math
import os
from copy import deepcopy
from functools import partial
from itertools import product

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import tiny
from loaded_once import FROZEN

from flowkern.rl.algorithms import names
from flowkern.rl.cost import network_calls
from flowkern.train import flow
from flowkern.train.config import from_dict
from flowkern.train.loop import Loop

PIXELS, VIDEO = {"height": 32, "width": 32}, {"height": 32, "width": 32, "num_frames": 5}
SIZES = {
    **dict.fromkeys(tiny.PIPELINES, PIXELS),
    **dict.fromkeys(("wan", "wan_a14b", "wan_ti2v", "hunyuan_video"), VIDEO),
    "ltx": VIDEO | {"num_frames": 9},
}
PROMPTS = ["a red cat", "an old photo of the small blue dog on a seven"]  # of two lengths
COMMON = {"group_size": 2, "prompts_per_rollout": 2, "updates_per_rollout": 2}
SMALL = {
    "awm": {"num_inference_steps": 4, "num_train_timesteps": 2},
    "branch_grpo": {"num_inference_steps": 3, "split_steps": [0]},
    "dance_grpo": {"num_inference_steps": 4},
    "dense_grpo": {"num_inference_steps": 3, "guidance_scale": 2.0},
    "crd": {"num_inference_steps": 3},
    "dgpo": {"num_inference_steps": 3, "num_train_timesteps": 2, "guidance_scale": 2.0},
    "diffusion_nft": {"num_inference_steps": 3},
    "diffusion_opd": {"num_inference_steps": 3, "guidance_scale": 2.0},
    "flash_grpo": {"num_inference_steps": 4, "guidance_scale": 2.0},
    "flow_dppo": {"num_inference_steps": 4, "num_sde_steps": 2, "guidance_scale": 2.0},
    "flow_grpo": {"num_inference_steps": 3, "guidance_scale": 2.0},
    "flow_grpo_fast": {"num_inference_steps": 4, "window": 2, "guidance_scale": 2.0},
    "g2rpo": {"num_inference_steps": 5, "branch_steps": 2},
    "gardo": {"num_inference_steps": 3, "diversity_reward": None},
    "grpo_guard": {"num_inference_steps": 3, "guidance_scale": 2.0},
    "mixgrpo": {"num_inference_steps": 4, "window": 2, "uncond_gradient": True},
    "mixgrpo_flash": {"num_inference_steps": 6, "window": 2},
    "mixgrpo_flash_star": {"num_inference_steps": 8, "window": 2},
    "pref_grpo": {"num_inference_steps": 4},
    "tempflow_grpo": {"num_inference_steps": 3, "num_seeds": 1, "guidance_scale": 2.0},
    "tree_rpo": {"num_inference_steps": 4, "window": 1},
}
SMALL["mixgrpo"]["guidance_scale"] = 2.0
SMALL["gardo"]["auxiliary_rewards"] = [f"{__name__}:brightness"]
FAMILIES, EVERY = list(SIZES), os.environ.get("FLOWKERN_EVERY_CELL") == "1"
ON_THE_HOST = ("wan_a14b", "z_image")
"""Families that choose by what the host knows of a row."""
PAIRS = [
    (FAMILIES[i % len(FAMILIES)], names()[(i + 5) % len(names())])
    for i in range(max(len(FAMILIES), len(names())))
]
CELLS = list(product(FAMILIES, names())) if EVERY else PAIRS


def brightness(images, prompts, metadata):
    """In millionths: a VAE of random weights makes siblings alike, and equals teach nothing."""
    assert 0 <= images.min() and images.max() <= 1
    return 1e6 * images.double().flatten(1).mean(1)


@pytest.fixture
def models(family, directories, loaded):
    """The family's, by dtype: read before a cell begins, which has a second."""
    read = partial(loaded, directories(family), FROZEN, **SIZES[family])
    return {dtype: read(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture
def loop_of(models, tmp_path, monkeypatch):
    """loop_of(algorithm, dtype)"""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def of(algorithm, dtype=torch.float32):
        config = {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path)},
            "data": {"train_prompts": str(tmp_path / "prompts.txt")},
            "reward": {f"{__name__}:brightness": {}},
            "lora": {"rank": 2, "alpha": 4},
            "train": {"steps": 4, "max_batch": 64, "learning_rate": 1e-3},
            "algorithm": {"name": algorithm, **COMMON, **SMALL[algorithm]},
        }
        torch.manual_seed(0)
        if algorithm == "diffusion_opd":
            config["algorithm"]["teacher"] = teacher(config, deepcopy(models[dtype]))
        return Loop(from_dict(config), models[dtype])

    def teacher(config, model):
        flow_grpo = {"name": "flow_grpo", **COMMON, **SMALL["flow_grpo"]}
        loop, place = (
            Loop(from_dict(config | {"algorithm": flow_grpo}), model),
            tmp_path / "teacher",
        )
        with torch.no_grad():
            for weight in loop.parameters:
                weight.add_(0.1)
        loop.task.save(place)
        return str(place)

    return of


def test_the_cells_cover_every_algorithm_and_every_family():
    assert sorted(SMALL) == names() and FAMILIES == list(tiny.PIPELINES)
    for cells in (PAIRS, CELLS):
        for one in (*FAMILIES, *names()):
            assert any(one in cell for cell in cells), one


@pytest.mark.parametrize("family, algorithm", CELLS)
def test_it_trains(family, algorithm, loop_of):
    rewards = {}
    for dtype in (torch.float32, torch.bfloat16):
        loop = loop_of(algorithm, dtype)
        cost = loop.recipe.plan(loop.task.model.sigmas, 0, 0).cost()
        sampled, trained = network_calls(loop.recipe, cost)
        records = loop.step()
        assert all(math.isfinite(value) for record in records for value in record.values())
        assert records[0]["nfe/sample"] == sampled
        assert [record["nfe/train"] for record in records] == trained
        # Of an update off policy all that is left may be clipped.
        assert records[0]["ratio_mean"] == 1 and records[0]["grad_norm"] > 0
        rewards[dtype] = records[0]["reward/mean"]
    print(f"{family}, {algorithm}: {rewards}")
    assert rewards[torch.bfloat16] == pytest.approx(rewards[torch.float32], abs=500)


@pytest.mark.parametrize("family", FAMILIES if EVERY else ON_THE_HOST)
def test_the_host_waits_for_no_family(family, loop_of, monkeypatch):
    """Neither in a rollout nor in its losses, on a device that keeps no values."""
    loop, device = loop_of("flow_grpo"), torch.device("meta")
    loop.task.model.network.to(device)
    monkeypatch.setattr(loop.task, "device", device)
    conditioning = loop.task.model.encode([*PROMPTS, loop.task.model.guidance.negative_prompt])
    conditioning = conditioning.to(device)
    blocks = loop.task.sample(0, conditioning)
    ((_, leaves),) = blocks
    assert leaves.device == device
    advantage = torch.ones(1, len(PROMPTS), len(blocks.rollout.plan.trained))
    figures = {"figures": {}, "every": {}, "laps": None, "samples": 4, "unit": "images"}
    parts = {"rollout": blocks.rollout, "conditioning": conditioning, "advantage": advantage}
    for batch in loop.task.batches(flow.FlowExperience(**figures, **parts), 0):
        out = loop.task.loss(batch, loop.weights)
        loop.accelerator.backward(out.loss / batch.total)
    trained = [p for p in loop.task.model.network.parameters() if p.requires_grad]
    assert len(trained) == len(loop.parameters) and all(p.grad is not None for p in trained)
