"""Prompt files, and which prompts an iteration takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Rows {"prompt": ..., metadata}: of a .jsonl file, or one per line of any other text file.

    Raises FileNotFoundError, and ValueError naming the line that is not such a row.
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {str(path)!r}")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        row: Any = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{path}, line {number}: got {line!r}, expected a string 'prompt'")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no prompts")
    return rows


def draw_prompts(available: int, count: int, seed: int, iteration: int) -> list[int]:
    """`count` different rows of `available`; follows from seed and iteration alone.

    Raises ValueError where there are too few.
    """
    if count > available:
        raise ValueError(
            f"algorithm.prompts_per_rollout: got {count}, expected at most the {available} of "
            "data.train_prompts"
        )
    return np.random.default_rng([seed, iteration]).permutation(available)[:count].tolist()
