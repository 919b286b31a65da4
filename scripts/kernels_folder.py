"""Lays the kernels out as the folder that Hugging Face's `kernels` package loads.

    python scripts/kernels_folder.py [--output build/kernels/flowkern] [--check]

The folder has build/torch-cpu and build/torch-cuda: the ops and the schedules, and the native
modules of this tree and of the wheels in dist/, one for each Python; where none fits, there are
Triton and the reference. Several kernels, and flowkern itself, may be loaded in one process, so in
the folder the package, and the namespace of its ops, have a name that its contents decide.
--check loads the folder with the real `kernels` package, in an environment of its own
(load_kernels_folder.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

from environments import ROOT, environment, run

PACKAGE = ROOT / "flowkern"
PARTS = ("__init__.py", "checks.py", "lookup.py", "torch_private.py", "schedules*", "ops")
# The package's name where it is one of a module or of an op, not in what is told to a person.
OWN_NAME = re.compile(
    r'^(?P<import>\s*(?:from|import) )flowkern\b|(?P<quote>")flowkern(?=(?:\.[\w{}]+)+"|::)', re.M
)
BACKENDS = {"cpu": ("_cpu",), "cuda": ("_cpu", "_cuda")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "kernels" / "flowkern")
    parser.add_argument("--check", action="store_true", help="load it with the kernels package")
    options = parser.parse_args()
    lay_out(options.output, PACKAGE, sorted((ROOT / "dist").glob("flowkern-*.whl")))
    for variant in sorted(options.output.glob("build/*")):
        native = sorted(path.name for path in variant.glob("*.so"))
        print(f"{variant}: {json.loads((variant / 'metadata.json').read_text())['id']}", *native)
    if options.check:
        check(options.output)
    return 0


def lay_out(output: Path, package: Path, wheels: list[Path]) -> None:
    """Writes `output`, anew: of `package`, and the native modules of `wheels` beside its own."""
    shutil.rmtree(output, ignore_errors=True)
    texts = {path.relative_to(package): path.read_text() for path in sources(package)}
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:8]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for backend, modules in BACKENDS.items():
        variant = output / "build" / f"torch-{backend}"
        own = f"flowkern_{backend}_{digest}"
        for name, text in texts.items():
            target = variant / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(renamed(text, own))
        for module in modules:
            native(variant, package, wheels, module)
        metadata = {
            "id": own, "name": "flowkern", "version": 0, "license": project["license"],
            "kernels-minver": "0.17.0", "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", output)


def sources(package: Path) -> list[Path]:
    found = [path for part in PARTS for path in package.glob(part)]
    files = [file for path in found for file in ([path] if path.is_file() else path.rglob("*.py"))]
    return sorted(path for path in files if path.suffix == ".py")


def renamed(text: str, own: str) -> str:
    """Imports, modules imported by name and ops say `own` where they say flowkern."""
    return OWN_NAME.sub(lambda m: f"{m['import'] or m['quote']}{own}", text)


def native(variant: Path, package: Path, wheels: list[Path], module: str) -> None:
    """The compiled modules of this name, of each Python, a wheel's before the tree's."""
    for path in package.glob(f"{module}.*.so"):
        shutil.copy(path, variant)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.fullmatch(rf"flowkern/{module}\.[^/]*\.so", name):
                    (variant / Path(name).name).write_bytes(archive.read(name))


def check(output: Path) -> None:
    python = environment(ROOT / "build/kernels/env", sys.executable, "torch", "numpy", "kernels")
    run(python, "-I", ROOT / "scripts/load_kernels_folder.py", output, ROOT, HF_HUB_OFFLINE="1")


if __name__ == "__main__":
    sys.exit(main())
