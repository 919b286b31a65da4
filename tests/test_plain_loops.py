"""The plain loops that train_step.py times: they do what flowkern does, in the released calls."""

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts" / "gpu")]
pytest.importorskip("diffusers")
import counting  # noqa: E402
import part_b  # noqa: E402
import part_e  # noqa: E402
import torch  # noqa: E402
import train_step  # noqa: E402
from contenders import WAYS, Contender, operations  # noqa: E402
from plain_loops import LOOPS  # noqa: E402
from settings import MODELS, Setting  # noqa: E402

from flowkern.train.config import LoraConfig  # noqa: E402
from flowkern.train.lora import add_lora  # noqa: E402

EVERY = os.environ.get("FLOWKERN_EVERY_CELL") == "1"
# Each formula, each way through the network, and each family once.
CASES = [("tiny", name) for name in ("awm", "diffusion_nft", "grpo_guard", "dance_grpo")]
CASES += [("tiny", "tempflow_grpo"), ("tiny-flux1", "flow_grpo_fast"), ("tiny-wan21", "flow_grpo")]
if EVERY:
    CASES = [(model, name) for model in ("tiny", "tiny-flux1", "tiny-wan21") for name in LOOPS]
# As few as hold a window; Flash has a step after it from so many on (released: else none).
STEPS = {"g2rpo": 9, "mixgrpo_flash": 25, "mixgrpo_flash_star": 25}


@pytest.mark.parametrize("model, name", CASES)
def test_a_plain_iteration_is_flowkerns(model, name):
    """The same images and gradient, in the middle of a run; the network's rows are those that the
    released loop is said to take, with both halves of guidance in training, too."""
    asked = Setting(model, name, 2, 8, "cpu", 150, STEPS.get(name, 6))
    plain, ours = Contender(WAYS["a"], asked.released_batch()), Contender(WAYS["c"], asked)
    rows, other = plain.rollout(True), ours.rollout(True)
    for key, right in ours.found.items():
        off = (plain.found[key] - right).norm() / right.norm()
        assert off < 1e-3, f"{key}: off by {off}"  # float32, of sums that cancel
    assert other["ratio_mean"] == 1 and rows["images"] == other["images"]
    assert rows["ratio_mean"] is None or abs(rows["ratio_mean"] - 1) < 1e-5
    recipe = plain.trainer.recipe
    assert rows["rows"] == counting.rows(recipe, 150, is_plain=True)
    assert other["rows"] == counting.rows(recipe, 150, is_plain=False)
    # Once more: both halves of guidance in training, too, and every reference and copy.
    calls = plain.halves * recipe.released(150).train
    assert rows["rows"]["learning"] == calls
    anchors = plain.trainer.task.objective.anchors
    assert rows["rows"].get("not learning", 0) == calls * len(anchors)


def test_ways_are_compared_image_by_image(monkeypatch):
    """With another algorithm's plain loop, too, which makes other numbers of images."""
    monkeypatch.setattr(
        sys, "argv", "x --model tiny --algorithm awm --device cpu --contenders c,a:g2rpo".split()
    )
    match = object.__new__(train_step.Match)
    match.options = train_step._arguments()
    assert match.setting("c").algorithm == "awm" and match.setting("c").batch == 16
    assert match.setting("a:g2rpo").algorithm == "g2rpo" and match.setting("a:g2rpo").batch == 1

    def turns(way, images, *seconds):
        row = {"way": way, "images": images, "model_tflop": 3.0, "is_warm_up": False}
        return [row | {"seconds": 9.0, "processor_s": each} for each in seconds]

    match.result = {"rollouts": [*turns("c", 8, 5.0, 4.0, 8.0), *turns("a:g2rpo", 96, 240.0)]}
    assert match.ratios() == {"c to a:g2rpo": 240 / 96 / (5 / 8)}
    assert match.counted() == {"c to a:g2rpo": 8 / 96}
    assert "(c) flowkern: 1.60 images/s of the processor (1.00 to 2.00 in 3 turns)" in match.table()


@pytest.mark.parametrize("part", [part_b, part_e])
def test_iterations_that_a_card_is_asked_for_can_be_asked_for(part, monkeypatch, tmp_path):
    monkeypatch.setattr(part, "IS_REHEARSAL", False)
    ran = []
    part.run(SimpleNamespace(results=tmp_path, run=lambda *step: ran.append(step)))
    commands = [list(map(str, step[2])) for step in ran if "train_step.py" in str(step[2])]
    assert len(commands) == {part_b: 1, part_e: 2}[part]
    for command in commands:
        monkeypatch.setattr(sys, "argv", command[1:])
        options = train_step._arguments()
        assert options.algorithm == "flow_grpo" and not options.model.startswith("tiny")
        assert options.contenders[:2] == ["a", "c"]


@pytest.mark.parametrize("name", ["sd35m", "flux1", "wan21-1.3b"])
def test_what_is_compiled_ahead_has_the_blocks_of_the_whole(name):
    """Every sort of them, with adapters; or the last alone, beside which others may miss."""

    def sorts_of(architecture):
        model = architecture.build(torch.device("meta"), torch.bfloat16)
        add_lora(model, LoraConfig(rank=32, alpha=64))
        blocks = model.repeated()
        names = [tuple(n for n, _ in block.named_parameters()) for block in blocks]
        return set(zip(map(type, blocks), names, strict=True)), len(blocks)

    whole, count = sorts_of(MODELS[name])
    for sorts in (1, 2):
        few, less = sorts_of(MODELS[name].smaller(sorts))
        assert few <= whole and less < count / 4 and (sorts == 1 or few == whole)


@pytest.mark.skipif(not EVERY, reason="FLOWKERN_EVERY_CELL=1: half a minute each")
@pytest.mark.parametrize("model, family", [("flux1", "flux"), ("wan21-1.3b", "wan")])
def test_operations_are_those_of_a_network_asked_by_hand(model, family):
    network_models = importlib.import_module("network_models")
    counted, right = operations(MODELS[model]), network_models.operations(family)
    assert counted["forward"] == pytest.approx(right.forward, rel=1e-3)
    assert counted["both"] == pytest.approx(right.both, rel=1e-3)
