"""The house rules as tests: which way imports run, which names stay in their room, which rooms are
complete.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowkern"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom inside the package; a room knows itself, and everyone what lies in the hall.
HALL = {"checks", "lookup", "torch_private"}
MAY_IMPORT = {
    "checks": set(),
    "lookup": {"checks"},
    "torch_private": set(),
    "schedules": set(),
    "ops": {"schedules"},
    "rollout": {"schedules", "ops"},
    "rl": {"schedules", "ops", "rollout"},
    "models": {"schedules"},
    "rewards": set(),
    "compat": {"schedules", "ops"},
    "train": {"schedules", "ops", "rollout", "rl", "models", "rewards"},
    "demo": {"rl", "train"},
    "cli": {"schedules", "ops", "rollout", "rl", "models", "rewards", "train", "demo"},
}
HEAVY = {
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "wandb",
    "matplotlib",
    "sklearn",
    "triton",
}
HEAVY_ROOMS = {"models", "rewards", "agent", "train"}


def imports(path):
    """(module name, imported at module level) of every import statement of a file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.relative_to(ROOT).with_suffix("").parts
            parent = ".".join(base[: len(base) - node.level]) if node.level else ""
            module = ".".join(filter(None, [parent, node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) in top


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downhill(path):
    here = room(path)
    for name, at_top in imports(path):
        parts = name.split(".")
        if parts[0] == "flowkern" and here not in ("__init__", "__main__") and len(parts) > 1:
            other = parts[1]
            fine = MAY_IMPORT[here] | {here, "_cpu", "_cuda", "__version__"}
            assert other in (fine if here in HALL else fine | HALL), f"{here} imports {name}"
            if here == "ops" and other == "ops" and len(parts) > 2:
                mine = path.relative_to(PACKAGE).parts[1]
                assert parts[2] in (mine, "_common"), f"ops/{mine} imports {name}"
        if parts[0] in HEAVY:
            allowed = here in HEAVY_ROOMS or (parts[0] == "triton" and "triton" in path.name)
            # Elsewhere only `dispatch` may ask, inside a function, whether triton is there.
            assert allowed or (parts[0] == "triton" and not at_top), f"{path.name} imports {name}"


def test_import_flowkern_costs_torch_and_nothing_else():
    code = f"import sys, flowkern; print([m for m in {sorted(HEAVY)!r} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert loaded.stdout.strip() == "[]"


def test_algorithm_names_stay_in_their_room():
    names = {p.stem for p in (PACKAGE / "rl" / "algorithms").glob("*.py")} - {"__init__"}
    assert names
    for path in SOURCES:
        relative = path.relative_to(PACKAGE).parts
        if relative[:2] == ("rl", "algorithms") or relative[0] == "compat":
            continue
        if relative[:2] == ("ops", "matching_loss"):
            continue  # one of its two losses has the name of the algorithm it was made for
        code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
        for name in names:
            # A module path of the drop-ins may carry another project's name.
            assert not re.search(rf"\b{name}\b", code.replace(f"compat.{name}", "")), (
                f"{name} occurs in {path}"
            )


def test_names_of_model_families_stay_in_their_room():
    from flowkern.models import MODELS

    names = {word for item in MODELS.items() for word in re.split(r"\W+", " ".join(item))}
    names -= {"flowkern", "models"}
    assert "sd3" in names and "StableDiffusion3Pipeline" in names
    for path in SOURCES:
        if room(path) not in ("models", "compat"):
            code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
            # A folder of the demo may be called after one, digits-sd3.
            found = [name for name in names if re.search(rf"(?<![\w-]){name}\b", code)]
            assert not found, f"{found} in {path}"


def _without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [
                n
                for n in node.body
                if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ] or [ast.Pass()]
    return tree


def test_every_op_has_its_five_rooms():
    ops = [p.name for p in (PACKAGE / "ops").iterdir() if p.is_dir() and not p.name.startswith("_")]
    assert "sde_step" in ops
    for op in ops:
        for path in (
            PACKAGE / "ops" / op / "api.py",
            PACKAGE / "ops" / op / "reference.py",
            ROOT / "tests" / "ops" / f"test_{op}.py",
            ROOT / "benchmarks" / f"bench_{op}.py",
            ROOT / "docs" / "ops" / f"{op}.md",
        ):
            assert path.exists(), path.relative_to(ROOT)


def test_no_room_for_leftovers():
    tracked = [
        p
        for folder in ("flowkern", "csrc", "tests", "benchmarks", "scripts")
        for p in (ROOT / folder).rglob("*.*")
    ]
    for path in tracked:
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
            text = path.read_text()
            assert path.name not in ("utils.py", "helpers.py"), path
            assert len(text.splitlines()) <= 400 or path.is_relative_to(ROOT / "tests"), (
                f"{path} is over 400 lines"
            )
            if (
                path.is_relative_to(PACKAGE)
                and room(path) in ("ops", "rl", "rollout")
                and path.suffix == ".py"
            ):
                assert ".item()" not in text, f"{path} reads a tensor on the host"
