"""The run directory: begun anew or continued, and what a restart changes is told or refused.

Whatever is removed goes in an order that leaves, at every moment, a run that can be continued: the
names of checkpoints, the newest first; then their bytes; then the lines that speak of them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flowkern.train import checkpoint, durable
from flowkern.train import tree as trees
from flowkern.train.config import ConfigError
from flowkern.train.tracking import flat

METRICS, VALIDATION, CONFIG, SAMPLES = "metrics.jsonl", "validation.jsonl", "config.yaml", "samples"
FIXED = ("seed", "model.", "lora.", "algorithm.")
"""Keys, or their beginnings, that stay for the whole of a run."""
FREE = ("output_dir", "train.resume_from_checkpoint", "train.overwrite_output_dir")
"""Keys that say how a process is started, and nothing about the run."""


def begin(output_dir: Path, overwrite: bool, is_restart: bool) -> None:
    """Make the directory one of a run that has no checkpoint yet.

    is_restart: the command continues whatever there is; a run that was killed before its first
    checkpoint is then begun again. Raises ConfigError where there is a run to be lost.
    """
    checkpoint.tidy(output_dir)
    holds = checkpoint.checkpoints(output_dir) or (
        durable.read_lines(output_dir / METRICS) and not is_restart
    )
    if holds and not overwrite:
        raise ConfigError(
            f"output_dir: {str(output_dir)!r} holds a run already; continue it with "
            "train.resume_from_checkpoint=latest, replace it with train.overwrite_output_dir=true, "
            "or name another"
        )
    checkpoint.discard(output_dir)
    shutil.rmtree(output_dir / SAMPLES, ignore_errors=True)
    for pattern in (METRICS, VALIDATION, "config-*.yaml", "reward_curve.png", "report.html"):
        for path in output_dir.glob(pattern):
            path.unlink()


def resume(output_dir: Path, found: Path, step: int, tree: Mapping[str, Any]) -> None:
    """Make the directory as it was when the checkpoint `found` was written, at `step`: what came
    after it is dropped. The configuration until then stays as config-N.yaml if `tree` is another.
    """
    checkpoint.tidy(output_dir)
    checkpoint.discard(output_dir, after=step)
    for name, path in _numbered(output_dir, "config-*.yaml", r"config-(\d+)\.yaml"):
        if name > step:
            path.unlink()
    for name, path in _numbered(output_dir / SAMPLES, "step-*.png", r"step-(\d+)\.png"):
        if name > step:
            path.unlink()
    for name in (METRICS, VALIDATION):
        durable.truncate_lines(output_dir / name, step)
    earlier = output_dir / f"config-{step}.yaml"
    if changes(found, tree) and not earlier.exists():
        durable.replace(earlier, (found / CONFIG).read_bytes())


def _numbered(directory: Path, pattern: str, name: str) -> list[tuple[int, Path]]:
    matches = [(re.fullmatch(name, path.name), path) for path in directory.glob(pattern)]
    return [(int(match[1]), path) for match, path in matches if match]


def dump(tree: Mapping[str, Any]) -> str:
    """A configuration as it is stored."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def changes(found: Path, tree: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the configuration `tree` has otherwise than the checkpoint's: key -> (its, ours)."""
    its, ours = flat(trees.read_file(found / CONFIG)), flat(yaml.safe_load(dump(tree)))
    differing = {key: (its.get(key), ours.get(key)) for key in its | ours}
    return {
        key: (old, new)
        for key, (old, new) in differing.items()
        if old != new and key not in FREE and not _is_same_path(key, old, new)
    }


def _is_same_path(key: str, *values: Any) -> bool:
    if key not in ("model.path", "data.train_prompts", "data.test_prompts") or None in values:
        return False
    return len({Path(value).resolve() for value in values}) == 1


def refuse_other_run(found: Path, tree: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The `changes` that a resumed run takes over.

    Raises ConfigError for one that would make it another run.
    """
    taken = {}
    for key, (old, new) in changes(found, tree).items():
        if key == FIXED[0] or key.startswith(FIXED[1:]):
            if old is None or new is None:
                continue
            raise ConfigError(
                f"{key}: got {new!r}, but the run that is resumed has {old!r}; expected the same, "
                "or a new output_dir"
            )
        taken[key] = (old, new)
    return taken
