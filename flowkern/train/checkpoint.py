"""Checkpoints: directories checkpoint-N that are whole or not there.

One holds the adapter (for peft and for diffusers), the optimizer, the random state of every rank,
the step and the configuration. It is written under another name and renamed when complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return [path for _, path in sorted((int(m[1]), path) for m, path in found if m)]


def find_checkpoint(name: str, output_dir: str | Path = ".") -> Path | None:
    """The checkpoint called `name`: a directory, or "latest" of output_dir (None if it has none).

    Raises FileNotFoundError for a directory that is no checkpoint.
    """
    if name == "latest":
        return next(reversed(checkpoints(output_dir)), None)
    path = Path(name)
    if not (path / "state.pt").is_file():
        raise FileNotFoundError(
            f"train.resume_from_checkpoint: {name!r} is no checkpoint; expected a directory "
            'checkpoint-N of a run, or "latest"'
        )
    return path


def partial_path(output_dir: str | Path, step: int) -> Path:
    """Where checkpoint-`step` is written before `commit` gives it its name."""
    return Path(output_dir) / f"checkpoint-{step}.partial"


def begin(directory: Path) -> None:
    """Make the directory of `partial_path`, empty."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def commit(directory: Path, limit: int | None) -> Path:
    """Make a filled directory a checkpoint, and remove the oldest others beyond `limit`."""
    for path in [*directory.iterdir(), directory]:
        _sync(path)  # its bytes before its name
    final = directory.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(directory, final)
    _sync(final.parent)
    for old in checkpoints(final.parent)[: -limit if limit else 0]:
        if old != final:
            shutil.rmtree(old)
    return final


def discard_later(output_dir: str | Path, step: int) -> None:
    """Remove the checkpoints beyond `step`: a run that resumes there abandons them."""
    for path in checkpoints(output_dir):
        if int(_NAME.fullmatch(path.name)[1]) > step:
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_random_state(path: Path) -> None:
    """This rank's generators; the noise needs none, but a reward of the user's own may."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, path)


def load_random_state(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def truncate_lines(path: Path, step: int) -> None:
    """Drop what a .jsonl file says of steps after `step`, and a line that was cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            is_later = json.loads(line)["step"] > step
        except json.JSONDecodeError:
            break
        if is_later:
            break
        kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def prepare_output_dir(output_dir: str | Path, resumed: Path | None, overwrite: bool) -> None:
    """Make the run directory; resumed: the checkpoint that the run continues, if any.

    Raises FileExistsError where it holds another run.
    """
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    if resumed is not None and resumed.resolve().parent == directory.resolve():
        return
    if not ((directory / "metrics.jsonl").exists() or checkpoints(directory)):
        return
    if not overwrite:
        raise FileExistsError(
            f"output_dir: {str(output_dir)!r} holds a run already; continue it with "
            "train.resume_from_checkpoint=latest, replace it with train.overwrite_output_dir=true, "
            "or name another"
        )
    for name in ("samples", *(path.name for path in directory.glob("checkpoint-*"))):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("metrics.jsonl", "validation.jsonl", "reward_curve.png"):
        (directory / name).unlink(missing_ok=True)
