"""What the page of drop-ins tells a reader to write is there."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compat.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
IMPORTS = [
    f"{node.module}.{alias.name}"
    for block in BLOCKS
    for node in ast.walk(ast.parse(block))
    if isinstance(node, ast.ImportFrom) and node.module.startswith("flowkern.compat")
    for alias in node.names
]
SAID = sorted({*IMPORTS, *re.findall(r"flowkern\.compat\.\w+(?:\.\w+)*", PAGE)})


@pytest.mark.parametrize("path", SAID)
def test_a_name_of_the_page(path):
    """As flags, YAML and imports find it; or in one line the project that is not installed."""
    package, compat, module, *names = path.split(".")
    try:
        found = importlib.import_module(f"{package}.{compat}.{module}")
        for name in names:
            found = getattr(found, name)
    except ImportError as missing:
        assert "cannot be imported, No module named" in str(missing)
        assert "\n" not in str(missing)


def test_the_page_has_all_projects():
    files = {path.stem for path in (ROOT / "flowkern" / "compat").iterdir()}
    assert {path.split(".")[2] for path in SAID} == {f for f in files if not f.startswith("_")}
