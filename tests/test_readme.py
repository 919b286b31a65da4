"""What the README and the page of the Python interface show runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs/api.md").read_text()
BLOCKS = [
    one for page in (README, API) for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[2][:40])
def test_python_blocks_run(block):
    if "diffusers" in block:
        pytest.importorskip("diffusers")
    made = {}
    exec(compile(block, "README.md", "exec"), made)
    if "redness" in made:
        scores, said = made["redness"](torch.rand(4, 3, 8, 8), ["a"] * 4, [{}] * 4)
        assert scores.shape == said["brightness"].shape == (4,)


def test_the_configuration_is_one(tmp_path, monkeypatch):
    pytest.importorskip("pydantic")
    from flowkern.train.config import load_config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (name, text), *others = re.findall(r"```yaml\n# (\S+)\n(.*?)```", README, re.DOTALL)
    assert not others and len(text.splitlines()) == 6
    (tmp_path / name).write_text(text)
    config = load_config(name, ['reward={"mine:redness": {}}'])
    assert config.model.path.endswith("stable-diffusion-3.5-medium")
    assert load_config(name).reward.weights == {"pickscore": 1.0}
    commands = re.findall(r"^    flowkern (\w+(?: --estimate)?) (\S+)", README, re.MULTILINE)
    asked = {
        ("doctor --estimate", name),
        ("doctor", name),
        ("train", name),
        ("sample", "runs/first"),
    }
    assert asked <= set(commands)
    assert str(tmp_path / "runs/first") == config.output_dir


def test_it_counts_the_algorithms():
    from flowkern.rl.algorithms import names

    assert re.findall(r"(\S+) algorithms run on one engine", README) == [str(len(names()))]


def test_pictures_and_links_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) >= 8
    for link in links:
        assert (ROOT / link).exists(), link


def test_it_is_short():
    assert len(README.splitlines()) <= 90  # a screen and a half
