"""Part D: what a network call costs, and what precision, compiling and a float8 base give."""

from __future__ import annotations

from steps import IS_REHEARSAL, PYTHON, Steps


def run(steps: Steps) -> None:
    command = [PYTHON, "scripts/gpu/network.py"]
    if IS_REHEARSAL:
        command += ["--device", "cpu", "--only", "wan"]
    steps.run("network", 175, command)
