"""Part E: whole iterations of FLUX.1-dev and of Wan 2.1 1.3B, flowkern and the plain loop.

Checkpointed, as both are trained on one card; Wan with four of its twenty steps.
"""

from __future__ import annotations

import torch
from steps import IS_REHEARSAL, PYTHON, Steps

ROOM = 120e9
"""Bytes of a card that holds FLUX.1-dev three times, and so the compiled contender, too."""


def run(steps: Steps) -> None:
    if IS_REHEARSAL:
        few = ["--device", "cpu", "--rollouts", "0", "--images", "2", "--steps", "2"]
        iterations(steps, "wan", 110, ["--model", "tiny-wan21", *few])
        return
    image = ["--model", "flux1", "--images", "4", "--rollouts", "1", "--limit", "120"]
    iterations(steps, "flux", 125, image)
    video = ["--model", "wan21-1.3b", "--images", "2", "--rollouts", "1", "--limit", "105"]
    iterations(steps, "wan", 110, [*video, "--steps", "4", "--max-batch", "4"])


def iterations(steps: Steps, name: str, limit: int, options: list[str]) -> None:
    command = [PYTHON, "benchmarks/train_step.py", "--algorithm", "flow_grpo", *options]
    command += ["--checkpointing", "--contenders", contenders()]
    steps.run(f"e2e-{name}", limit, [*command, "--json", steps.results / f"e2e-{name}.json"])


def contenders() -> str:
    has_room = torch.cuda.is_available()
    has_room = has_room and torch.cuda.get_device_properties(0).total_memory > ROOM
    return "a,c,d" if has_room else "a,c"
