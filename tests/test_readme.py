"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[2][:40])
def test_python_blocks_run(block):
    if "diffusers" in block:
        pytest.importorskip("diffusers")
    exec(compile(block, "README.md", "exec"), {})


def test_pictures_and_links_exist():
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) >= 8
    for link in links:
        assert (root / link).exists(), link
