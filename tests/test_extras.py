"""Packages that only some of flowkern needs: whoever lacks one reads how it is had, in a line."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from flowkern import cli
from flowkern.extras import EXTRAS, how_to_have

ROOT = Path(__file__).parents[1]
ALWAYS = {"flowkern", "torch", "numpy"}
OTHERWISE = {"httpx", "unirl"}
"""What serves in place of another; whose own a drop-in finds where they are."""
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "math_verify": "math-verify"}
OTHERS = {"huggingface_hub": "transformers", "tokenizers": "transformers", "cv2": "rapidocr"}
OTHERS |= {"tqdm": "diffusers", "pydantic_core": "pydantic"}
"""What comes with another."""


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_every_package_that_is_imported_is_known_by_its_extra():
    found = {}
    for path in (ROOT / "flowkern").rglob("*.py"):
        found |= dict.fromkeys((name.partition(".")[0] for name in imported(path)), path)
    others = found.keys() - sys.stdlib_module_names - ALWAYS - OTHERWISE - EXTRAS.keys()
    assert not others, [str(found[name]) for name in others]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for package, extra in EXTRAS.items():
        brought = [re.split("[<>=]", one)[0].replace("_", "-") for one in extras[extra]]
        name = OTHERS.get(package, NAMES.get(package, package))
        assert name.replace("_", "-") in brought, package


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_a_command_that_lacks_a_package_says_how_it_is_had(package, monkeypatch, capsys, tmp_path):
    def lacks(options):
        __import__(f"{package}.core")

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(cli.report, "run", lacks)
    assert cli.main(["report", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f": pip install 'flowkern[{EXTRAS[package]}]'\n") and package in said
    assert said.count("\n") == 1


def test_a_reward_that_lacks_a_package_says_how_it_is_had(monkeypatch):
    pytest.importorskip("accelerate")
    from flowkern.checks import ConfigError
    from flowkern.train.reward_config import Rewards
    from flowkern.train.scoring import load_rewards

    def lacks(*_):
        raise ModuleNotFoundError("No module named 'httpx2'", name="httpx2")

    monkeypatch.setattr("flowkern.lookup.import_module", lacks)
    said = r"^reward.remote: ModuleNotFoundError: No module named 'httpx2' .*: pip install 'flowk"
    with pytest.raises(ConfigError, match=said):
        load_rewards(Rewards.model_validate({"remote": {"name": "r", "url": "http://there:1"}}))
    assert how_to_have(ValueError("x")) == how_to_have(ImportError("x", name="torch")) == ""
