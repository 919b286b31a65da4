"""The kernels as a folder that Hugging Face's `kernels` package loads.

Loaded here as that package does (kernels 0.17: `__init__.py` of a variant, under the id of its
metadata.json); `make kernels` loads it with the package itself.
"""

import ast
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import flowkern as fk

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of this tree, and of a wheel that has the native module of another Python."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import kernels_folder
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    place = tmp_path_factory.mktemp("kernels")
    with zipfile.ZipFile(place / "flowkern-0-cp399.whl", "w") as wheel:
        wheel.writestr("flowkern/_cpu.cpython-399-x86_64-linux-gnu.so", b"of another Python")
        wheel.writestr("flowkern/agent/_cpu.cpython-399-x86_64-linux-gnu.so", b"of another place")
    kernels_folder.lay_out(place / "flowkern", ROOT / "flowkern", [*place.glob("*.whl")])
    return place / "flowkern"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_variant_names_nothing_of_an_installed_flowkern(folder, backend):
    variant = folder / "build" / f"torch-{backend}"
    told = json.loads((variant / "metadata.json").read_text())
    own = told["id"]
    assert own.isidentifier() and own.startswith(f"flowkern_{backend}_")
    assert told["backend"] == {"type": backend} and told["license"] == "Apache-2.0"
    brought = {*sys.stdlib_module_names, "torch", "numpy", "triton", own}
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            assert {name.partition(".")[0] for name in names} <= brought, (path, names)
    native = variant / "_cpu.cpython-399-x86_64-linux-gnu.so"
    assert native.read_bytes() == b"of another Python"


def test_it_draws_as_the_package_does_beside_it_and_from_its_own_modules(folder):
    variant = folder / "build" / "torch-cpu"
    own = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(own, variant / "__init__.py")
    theirs = sys.modules[own] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(theirs)
        drawn = []
        for package in (fk, theirs):
            edge = package.schedules.step_coefficients([1.0, 0.6, 0.0], "flow_sde", 0.7)[0]
            x, velocity = torch.ones(2, 40), torch.full((2, 40), 0.5, requires_grad=True)
            ids = torch.arange(2)
            x_next, _ = package.sde_step(x, velocity.detach(), edge, seed=0, sample_id=ids, step=0)
            package.sde_log_prob(x, velocity, x_next, edge).sum().backward()
            drawn.append((x_next, velocity.grad))
        assert all(map(torch.equal, *drawn))
        assert all(hasattr(theirs, name) for name in fk.__all__)
        assert theirs.backends("cpu").keys() == fk.backends("cpu").keys()
        assert (theirs.backends("cpu")["native"] is None) == (fk.backends("cpu")["native"] is None)
        loaded = [module for name, module in sys.modules.items() if name.startswith(f"{own}.")]
        assert len(loaded) > 20
        homes = {getattr(x, "__module__", None) or "" for m in loaded for x in vars(m).values()}
        assert not [home for home in homes if home.partition(".")[0] == "flowkern"]
        assert hasattr(getattr(torch.ops, own), "sde_draw")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == own]:
            del sys.modules[name]
