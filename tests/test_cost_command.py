"""`flowkern cost` prints the counts that the papers' defaults lead to."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from flowkern.cli import main
from flowkern.rollout import Plan

ROOT = Path(__file__).parents[1]
# sampling here and released, saved, training here and released, nfe of both, images
DEFAULTS = {
    "awm": "336 336 0% 144 144 336 288 24",
    "branch_grpo": "203 203 0% 187 218 203 187 16",
    "dance_grpo": "181 192 6% 103 108 181 103 12",
    "dense_grpo": "1320 1536 14% 216 216 2640 756 240",
    "crd": "240 240 0% 216 216 240 648 24",
    "dgpo": "160 160 0% 64 64 320 128 16",
    "diffusion_nft": "240 240 0% 216 216 240 432 24",
    "diffusion_opd": "10 10 0% 9 9 20 36 1",
    "flash_grpo": "160 160 0% 8 8 320 16 8",
    "flow_dppo": "160 160 0% 48 48 160 48 16",
    "flow_grpo": "240 240 0% 216 216 480 756 24",
    "flow_grpo_fast": "240 240 0% 72 72 240 72 24",
    "flow_grpo_fast, branching": "171 194 12% 25 48 171 25 24",
    "g2rpo": "1496 1792 17% 8 8 1496 8 192",
    "g2rpo, as in the paper": "1700 2188 22% 8 8 1700 8 288",
    "gardo": "217 240 10% 169 192 434 422.5 24",
    "grpo_guard": "240 240 0% 216 216 480 324 24",
    "mixgrpo": "289 300 4% 37 48 289 37 12",
    "mixgrpo_flash": "121 132 8% 37 48 121 37 12",
    "mixgrpo_flash_star": "73 84 13% 37 48 73 37 12",
    "pref_grpo": "193 200 4% 106 112 193 106 8",
    "tempflow_grpo": "1116 1116 0% 36 216 2232 126 216",
    "tree_rpo": "351 351 0% 15 30 351 15 16",
}
MEANS = {
    "awm": "336 336 0% 144 144 336 431.5 24",
    "crd": "240 240 0% 216 216 240 863.3 24",
    "dance_grpo": "181 192 6% 102 108 181 102 12",
    "dgpo": "160 160 0% 64 64 320 191.8 16",
    "diffusion_nft": "240 240 0% 216 216 240 647.3 24",
    "flow_grpo_fast, branching": "181.5 204.5 11% 25 48 181.5 25 24",
    "mixgrpo": "228.5 300 24% 37 48 228.5 37 12",
    "gardo": "217 240 10% 169 192 434 580.2 24",
    "pref_grpo": "193 200 4% 108.4 112 193 108.4 8",
    "mixgrpo_flash": "99.2 187.2 47% 37 48 99.2 37 12",
    "tree_rpo": "268.5 268.5 0% 15 30 268.5 15 16",
}


def printed(capsys, *arguments):
    """{(name, "" or what the mean is of): its numbers} of the table."""
    assert main(["cost", *arguments]) == 0
    note, more, head, *lines = capsys.readouterr().out.splitlines()
    assert "guidance not counted" in note and "guidance, of a reference" in more
    columns = "sampling released saved training released nfe/sample nfe/train images".split()
    assert head.split() == columns
    assert {len(line) for line in lines} == {len(head)}, "columns are aligned"
    out, name = {}, ""
    for line in lines:
        words = line.split()
        label = " ".join(words[:-8])
        name = name if line.startswith(" ") else label
        out[name, label if line.startswith(" ") else ""] = " ".join(words[-8:])
    return out


def test_every_algorithm_at_its_papers_defaults(capsys, monkeypatch):
    """The means of 300 rollouts where a run's differ; of the others, all is said by a few."""
    found = printed(capsys, *dict.fromkeys(name.split(",")[0] for name in MEANS))
    means = {name: row for (name, label), row in found.items() if label == "mean of 300"}
    assert means == MEANS
    monkeypatch.setattr("flowkern.cli.cost.ROLLOUTS", 3)
    found = printed(capsys)
    assert {name: row for (name, label), row in found.items() if not label} == DEFAULTS
    assert {name for name, label in found if label} <= MEANS.keys()


def test_only_the_algorithms_named(capsys, monkeypatch):
    monkeypatch.setattr("flowkern.cli.cost.ROLLOUTS", 30)
    found = printed(capsys, "mixgrpo", "awm")
    assert [name for name, _ in found] == ["mixgrpo", "mixgrpo", "awm", "awm"]
    assert main(["cost", "mix_gppo"]) == 2
    error = capsys.readouterr().err
    assert "got 'mix_gppo', expected" in error and error.endswith("did you mean 'mixgrpo'?\n")


def test_a_configuration_with_overrides(capsys):
    pytest.importorskip("yaml")
    path = str(ROOT / "configs/digits/g2rpo.yaml")
    paper = ["num_inference_steps=16", "branch_steps=8", "group_size=12"]
    for sizes, row in (
        ("[1, 2]", DEFAULTS["g2rpo"]),
        ("[1,2,3]", DEFAULTS["g2rpo, as in the paper"]),
    ):
        options = [f"algorithm.{option}" for option in (*paper, f"granularities={sizes}")]
        assert printed(capsys, "--config", path, *options) == {("g2rpo", ""): row}


def test_the_mean_of_a_short_run_is_of_its_own_rollouts(capsys):
    pytest.importorskip("yaml")
    options = ["algorithm.window_iterations=1", "algorithm.group_size=12", "train.steps=8"]
    path = str(ROOT / "configs/digits/mixgrpo.yaml")
    found = printed(capsys, "--config", path, *options, "algorithm.updates_per_rollout=4")
    # Starts 0 and 1: (c + 1) + 12 (24 - c) each.
    assert found["mixgrpo", "mean of 2"].startswith("283.5 300 6% 37 48")
    assert main(["cost", "--config", path, "--train.stepz", "1"]) == 2
    assert "train.stepz: unknown key" in capsys.readouterr().err


def test_what_cannot_be_counted_is_said_by_its_key(capsys, tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    (tmp_path / "lacking.py").write_text(
        "from dataclasses import dataclass\n"
        "from flowkern.rl.algorithms.flow_grpo import FlowGRPO\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Lacking(FlowGRPO):\n"
        "    wanted: int\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = str(ROOT / "configs/digits/mixgrpo.yaml")
    too_far = ["algorithm.sde_type=cps", "algorithm.noise_level=3"]
    for arguments, said in (
        (["--config", path, *too_far], "algorithm.noise_level: cps takes an angle in [0, 2], got"),
        (["--config", path, "algorithm.sde_type=math:sqrt"], "algorithm.sde_type: math:sqrt(1, "),
        (["lacking:Lacking"], "lacking:Lacking: has no defaults to count with: "),
    ):
        assert main(["cost", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"flowkern: {said}")
    del sys.modules["lacking"]


def pairs(name, place, between=" / "):
    """What the docs say of an algorithm: here / released, of the first rollout and of the mean."""
    found = [table[name].split()[place] for table in (DEFAULTS, MEANS) if name in table]
    return list(dict.fromkeys(between.join(pair) for pair in found))


def test_the_docs_show_these_numbers():
    said = {}
    for line in (ROOT / "docs/algorithms.md").read_text().splitlines():
        if " / " in line and (name := re.match(r"\| \[?`(\w+)`", line)):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            said.setdefault(name[1], cells[5:8])
    assert said.keys() == {name for name in DEFAULTS if "," not in name}
    for name, (sampling, training, calls) in said.items():
        assert sampling == ", mean ".join(pairs(name, slice(0, 2))), name
        assert training == ", mean ".join(pairs(name, slice(3, 5))), name
        assert calls == ", mean ".join(pairs(name, slice(5, 7), " + ")), name


def test_the_guide_has_the_calls_and_images_of_an_image():
    page = (ROOT / "docs/choosing.md").read_text()
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(.*?\) \| .*? \| (\d+) \| ([\d.]+) \+ ([\d.]+) \|", page, re.MULTILINE
    )
    said = {name: found for name, *found in rows}
    assert said.keys() == {name for name in DEFAULTS if "," not in name}
    for name, found in said.items():
        *_, sampling, training, images = MEANS.get(name, DEFAULTS[name]).split()
        calls = (float(calls) / int(images) for calls in (sampling, training))
        assert found == [images, *(f"{number:.1f}" for number in calls)], name


def test_the_recipe_in_the_docs_costs_what_it_says(capsys, tmp_path, monkeypatch):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/algorithms.md").read_text(), re.DOTALL
    )
    recipe, credit, cost, *_ = blocks
    (tmp_path / "fork.py").write_text(recipe)
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(cost, "docs/algorithms.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"# (Cost\(.*\))", cost)[1]
    made = {}
    exec(compile(credit, "docs/algorithms.md", "exec"), made)
    of_signs = importlib.import_module("fork").Fork().group_credit(made["Sign"])
    plan = Plan()
    for member in range(2):
        node = plan.draw(plan.root(member), 0.5, "flow_sde", 0.7, member, is_trained=True)
        plan.leaf(plan.step(node, 0.0))
    scores = {"a": torch.tensor([[1.0, 4.0]])}
    assert of_signs(scores, {"a": 1.0}, plan).tolist() == [[-1, 1]]
    found = printed(capsys, "fork:Fork")
    assert found["fork:Fork", ""] == "115 160 28% 1 16 115 1 16"
    del sys.modules["fork"]
