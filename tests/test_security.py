"""What SECURITY.md says is never done is nowhere in the sources, and licences are told of all."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for part in ("flowkern", "examples", "benchmarks", "scripts")
    for path in sorted((ROOT / part).rglob("*.py"))
]
UNPICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# The program that a sandbox runs, in the process that the sandbox is around.
SANDBOXED = "flowkern/agent/tools/sandboxes/warden.py"


def faults(source, runs_code=False):
    """What of a file loads a pickle, or runs what is not this project's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or ""] + [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in UNPICKLES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            yield f"{called} without weights_only=True"
        if called.startswith("yaml.") and called.removeprefix("yaml.") in (
            "load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader",
        ):  # fmt: skip
            yield called
        if called in ("np.load", "numpy.load") and "allow_pickle" in options:
            yield f"{called} with allow_pickle"
        if options.get("shell", "False") != "False":
            yield f"{called} with a shell"
        if called in ("eval", "exec") and not runs_code:
            yield called
        if options.get("trust_remote_code", "False") != "False":
            yield f"{called} with trust_remote_code"
        name = called.removesuffix(".from_pretrained")
        asks = "trust_remote_code" in options or None in options  # None: **of a variable
        if name != called and name.startswith("Auto") and not asks:
            yield f"{called} without trust_remote_code=False"  # it would ask at a terminal


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "import torch\ntorch.load(f)",
        "torch.load(f, weights_only=False)", "yaml.load(f)", "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)", "eval(c)", "f(trust_remote_code=True)",
        "AutoModel.from_pretrained(p)",
    ],
)  # fmt: skip
def test_what_would_be_a_fault_is_seen(source):
    assert list(faults(source))


def test_no_pickle_is_loaded_and_no_code_of_others_run():
    assert len(SOURCES) > 200
    found = {}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        wrong = list(faults(path.read_text(), runs_code=name == SANDBOXED))
        if wrong:
            found[name] = wrong
    assert not found


def test_the_page_of_licences_names_every_dependency():
    path = ROOT / "scripts" / "licences.py"
    spec = importlib.util.spec_from_file_location("licences", path)
    licences = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(licences)
    wanted, text = licences.wanted(), licences.PAGE.read_text()
    assert len(wanted) > 40 and {"torch", "numpy", "setuptools", "mkdocstrings"} <= wanted.keys()
    assert licences.listed(text) == wanted.keys(), "make it again: python scripts/licences.py"
    for name, by in wanted.items():
        assert f"| {name} | {', '.join(by)} | " in text, name
