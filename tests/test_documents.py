"""The pages: each has its place, links lead to files, what is made from the code is current."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("PIL")
ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in OUTSIDE)]
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_keys_is_current_and_says_what_each_is():
    script = loaded("configuration_page")
    page = script.page()
    assert script.PAGE.read_text() == page, "make it again: python scripts/configuration_page.py"
    for line in page.splitlines():
        if line.startswith("| `") and not line.startswith("| `algorithm."):
            assert not line.endswith("|  |"), f"no docstring: {line}"
    for key, kind, default in (
        ("train.learning_rate", "number, above 0 to 1e+06", "0.0003"),
        ("model.quantization", "`float8`, `int8`, `nf4`, or `null`", "null"),
        ("algorithm.kl_coef", "number, at least 0", "0.004"),
        ("algorithm.clip_high", "number, above 0", "0.2"),
    ):
        assert f"| `{key}` | {kind} | `{default}` |" in page


def test_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(
            r"\]\((?!https?:|mailto:|#)([^)#\s]+)", CODE.sub("", page.read_text())
        ):
            assert (page.parent / link).is_file(), f"{page.relative_to(ROOT)}: {link}"


def test_every_page_has_its_place_on_the_site():
    navigation = (
        (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\nextra_css:")[0]
    )
    listed = re.findall(r"(?m)^ *- .+: ([\w/]+\.md)", navigation, re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs")) for path in PAGES if "docs" in path.parts}
    assert pages == set(listed) - {"index.md", "changelog.md", "contributing.md", "security.md"}
    assert len(listed) == len(set(listed))


@pytest.mark.skipif(os.environ.get("FLOWKERN_EVERY_CELL") != "1", reason="ten seconds")
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs mkdocs-material")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site/index.html").read_text()
    picture = "benchmarks/results/intel-xeon-processor-2-threads/speed-summary.png"
    assert f'src="{picture}"' in home and (tmp_path / "site" / picture).is_file()
    for page in ("docs/rewards.md", "examples/own_reward.py", "CONTRIBUTING.md"):
        assert f"]({page})" in (ROOT / "README.md").read_text()
    for page in ("rewards.html", "examples/own_reward.py", "contributing.html"):
        assert f'href="{page}"' in home and (tmp_path / "site" / page).is_file()
    assert 'id="flowkern.sde_step"' in (tmp_path / "site/api.html").read_text()
