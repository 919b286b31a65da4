"""The house rules as tests: which way imports run, which names stay in their room, which rooms are
complete.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowkern"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom inside the package; a room knows itself, and everyone what lies in the hall.
# What has a dot is a file of a room.
HALL = {"checks", "extras", "lookup", "split", "torch_private", "web"}
MAY_IMPORT = {
    "checks": set(),
    "extras": {"checks"},
    "lookup": {"checks"},
    "split": set(),
    "torch_private": set(),
    "web": {"checks"},
    "schedules": set(),
    "ops": {"schedules"},
    "rollout": {"schedules", "ops"},
    "rl": {"schedules", "ops", "rollout"},
    "models": {"schedules", "ops"},
    "rewards": {"models.hub"},
    "agent": {"schedules", "ops", "rl", "rewards.judge"},
    "compat": {"schedules", "ops"},
    "train": {"schedules", "ops", "rollout", "rl", "models", "rewards", "agent"},
    "cli": {"schedules", "ops", "rollout", "rl", "models", "rewards", "agent", "train"},
}
# What a file of a room leaves to others: the loop knows no images, it asks a Task by its name.
MAY_NOT_IMPORT = {
    "train/loop.py": {"ops", "rollout", "models", "rewards", "agent"}
    | {f"train.{name}" for name in ("flow", "planner", "prompts", "scoring", "validation", "lora")},
}
HEAVY = {
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "wandb",
    "matplotlib",
    "sklearn",
    "pydantic",
    "yaml",
    "triton",
    "rich",
    "jinja2",
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


def is_in(name, rooms):
    """Is flowkern.`name` one of these rooms, or in one?"""
    return any(f"{name}.".startswith(f"{one}.") for one in rooms)


def test_every_room_is_known():
    rooms = {room(path) for path in SOURCES} - {"__init__", "__main__"}
    assert rooms == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downhill(path):
    here = room(path)
    for name, at_top in imports(path):
        first, _, inside = name.partition(".")
        if first == "flowkern" and here not in ("__init__", "__main__") and inside:
            fine = MAY_IMPORT[here] | {here, "_cpu", "_cuda", "__version__"}
            assert is_in(inside, fine if here in HALL else fine | HALL), f"{here} imports {name}"
            left = MAY_NOT_IMPORT.get(str(path.relative_to(PACKAGE)), ())
            assert not is_in(inside, left), f"{path.name} imports {name}"
            if here == "ops" and inside.startswith("ops."):
                mine = path.relative_to(PACKAGE).parts[1]
                assert is_in(inside, (f"ops.{mine}", "ops._common")), f"ops/{mine} imports {name}"
        if first in HEAVY:
            allowed = here in HEAVY_ROOMS or (first == "triton" and "triton" in path.name)
            # Elsewhere inside a function: `dispatch` asks whether triton is there, commands print.
            allowed |= not at_top and (first == "triton" or (here, first) == ("cli", "rich"))
            assert allowed, f"{path.name} imports {name}"


# Beside configs, docs and benchmarks, by name; tests may.
KNOW_ALGORITHMS = {
    "flowkern/rl/algorithms": "their room",
    "flowkern/compat": "its modules are called after projects",
    "flowkern/rewards": "its scales and rules are called after projects",
    "flowkern/ops/matching_loss": "one of its losses is called after the algorithm it was made for",
    "scripts/draw_plans.py": "draws the pictures of docs/algorithms.md",
    "scripts/gpu/part_b.py": "says which is timed on a model of real size",
    "scripts/gpu/part_e.py": "the same, on larger ones",
    "scripts/kill_runs.py": "kills runs of the demo, which has one",
    "scripts/soak.py": "runs the demo for hours, which has one",
    "scripts/what_fits.py": "says of which its table is",
}
KNOW_FAMILIES = {
    "flowkern/models": "their room",
    "flowkern/compat": "it has other projects' names",
    "scripts/pretrain_digits.py": "makes the demo's model, which is of a family",
    "scripts/kill_runs.py": "imports the demo's model before it forks",
    "scripts/gpu/network_models.py": "builds the published networks that are timed",
    "scripts/gpu/network_cases.py": "says which of them are timed, and how",
    "scripts/gpu/part_d.py": "rehearses one of them",
    "scripts/gpu/part_e.py": "says which are timed in whole iterations",
}


@cache
def code_of(path):
    return ast.unparse(_without_docstrings(ast.parse(path.read_text())))


def places_of(names, known):
    """(name, file) where the code of the package, of scripts or of setup.py says one of `names`."""
    assert all((ROOT / place).exists() for place in known)
    for path in (*SOURCES, *sorted((ROOT / "scripts").rglob("*.py")), ROOT / "setup.py"):
        place = str(path.relative_to(ROOT))
        if not place.startswith(tuple(known)):
            code = code_of(path)
            for name in names:
                # A folder of the demo may be called after a family, digits-sd3, and a module of the
                # drop-ins after a project.
                if re.search(rf"(?<![\w-])(?<!compat\.){name}\b", code):
                    yield name, place


def test_algorithm_names_stay_in_their_room():
    from flowkern.rl.algorithms import ALGORITHMS, PLANNERS

    files = {p.stem for p in (PACKAGE / "rl" / "algorithms").glob("*.py")} - {"__init__"}
    known = ALGORITHMS | PLANNERS
    assert files == set(known)
    names = files | {home.partition(":")[2] for home in known.values()}
    assert {"flow_grpo", "FlowGRPO"} <= names
    assert not list(places_of(names, KNOW_ALGORITHMS))


def test_names_of_model_families_stay_in_their_room():
    from flowkern.models import MODELS

    names = {word for item in MODELS.items() for word in re.split(r"\W+", " ".join(item))}
    names -= {"flowkern", "models"}
    assert "sd3" in names and "StableDiffusion3Pipeline" in names
    assert not list(places_of(names, KNOW_FAMILIES))


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


def test_no_two_test_files_have_one_name():
    """pytest, which has no packages here, takes the second for the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({*names}) == sorted(names)


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


# ---- sizes ----

LINES, ARGUMENTS = 60, 8
# More arguments than that: name -> what fixes them.
WIDE = {
    "sde_step": "a public verb",
    "ode_step": "a public verb",
    "sde_log_prob": "a public verb",
    "policy_loss": "a public verb",
    "matching_loss": "a public verb",
    "linear_policy_loss": "a public verb",
    "draw_op": "torch.library makes an operator's schema of a flat list",
}


@cache
def functions():
    """[(file, function)] of the package, benchmarks, scripts and setup.py."""
    found = []
    for folder in ("flowkern", "benchmarks", "scripts", "setup.py"):
        path = ROOT / folder
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.append((str(file.relative_to(ROOT)), node))
    return found


def test_functions_fit_a_screen():
    """With their docstrings: what is to be read of one stands together."""
    sizes = [(f.end_lineno - f.lineno + 1, f.name, file) for file, f in functions()]
    assert len(sizes) > 500
    assert not [size for size in sizes if size[0] > LINES]


def test_functions_take_what_can_be_counted():
    """But for verbs, whose arguments others rely on, drop-ins, which have other projects', and
    kernels, which Triton gives flat ones."""
    wide = set()
    for file, f in functions():
        names = {a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)}
        is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in f.decorator_list)
        is_others = file.startswith("flowkern/compat/") and not f.name.startswith("_")
        if len(names - {"self", "cls"}) > ARGUMENTS and not (is_kernel or is_others):
            assert f.name in WIDE, f"{file}: {f.name} takes {len(names)}"
            wide.add(f.name)
    assert wide == set(WIDE), "a list of what is there"
