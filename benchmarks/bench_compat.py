"""The drop-ins against the formulas that they replace, as published, in plain PyTorch.

Rows are in `drop_in_<project>.py` beside this file: ROWS there lists functions of a device that
return a `Case`, by `drop_ins.against`.

    python benchmarks/speed.py --module bench_compat [--only PROJECT]
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from harness import Case


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Of all projects; quick: the first row of each."""
    found = []
    for path in sorted(Path(__file__).parent.glob("drop_in_*.py")):
        for row in importlib.import_module(path.stem).ROWS[: 1 if quick else None]:
            found.append(row(device))
    return found
