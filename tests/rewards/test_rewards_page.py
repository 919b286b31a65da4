"""docs/rewards.md names every reward with its scales, and its example runs."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
from flowkern.lookup import load
from flowkern.rewards import REWARDS, load_reward

PAGE = (Path(__file__).parents[2] / "docs/rewards.md").read_text()


def test_every_reward_has_a_row_with_its_scales():
    """The default first; a row of several rewards may say another default of the later ones."""
    lines = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.match(r"\| \[?`", line)]
    lines = [cells for cells in lines if len(cells) == 5]
    names = [re.findall(r"`(\w+)`", cells[0]) for cells in lines]
    assert sorted(name for some in names for name in some) == sorted(REWARDS), "each once"
    rows = {
        name: re.findall(r"`(\w+)`", cells[-1]) or ["raw"]
        for cells, some in zip(lines, names, strict=True)
        for name in some
    }
    for name, told in rows.items():
        kind = load(name, REWARDS)
        known = getattr(kind, "scales", {"raw": (1, 0)})
        assert getattr(kind, "default_scale", "raw") in told and set(known) <= set(told), name
        if name != "jpeg_incompressibility":
            assert told[0] == getattr(kind, "default_scale", "raw"), name


def test_sections_that_are_pointed_to_are_there():
    sections = {
        f"#{name.lower().replace(' ', '-')}" for name in re.findall(r"^## (.*)$", PAGE, re.M)
    }
    assert set(re.findall(r"\]\((#[\w-]+)\)", PAGE)) <= sections


def test_the_example_is_a_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(def redness.*?)```", PAGE, re.S)[1]
    assert len(code.splitlines()) <= 5
    (tmp_path / "mymodule_of_the_page.py").write_text(code)
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = 1
    scores, beside = load_reward("mymodule_of_the_page:redness")(images, ["", ""], [{}, {}])
    assert scores.tolist() == [1, 0] and beside["brightness"][0] == pytest.approx(1 / 3)
