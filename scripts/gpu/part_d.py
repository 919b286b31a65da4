"""Part D: what a network call costs, and what precision, compiling and a float8 base give."""

from __future__ import annotations

import json
import re

from steps import IS_REHEARSAL, PYTHON, Steps

FAULT = "illegal memory access"


def run(steps: Steps) -> None:
    command = [PYTHON, "scripts/gpu/network.py"]
    if IS_REHEARSAL:
        command += ["--device", "cpu", "--only", "wan"]
    steps.run("network", 175, command)
    for case in faulty(steps):  # which kernel it was: launches waited for one by one
        words = re.findall(r"\w+", case)
        again = [*command, "--only", ",".join(words), "--seconds", "50"]
        apart = {"FLOWKERN_RESULTS": str(steps.results / "fault")}
        steps.run(f"fault-{words[0]}", 60, again, apart | {"CUDA_LAUNCH_BLOCKING": "1"})


def faulty(steps: Steps) -> list[str]:
    """The first case of network.json that a device fault ended."""
    path = steps.results / "network.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return [case for case, parts in found.items() if FAULT in json.dumps(parts)][:1]
