"""Checkpoints: directories checkpoint-N that are whole or not there, and can tell whether they are.

One holds the adapter (for peft and for diffusers), the optimizer, the copies of the weights, the
place in the run, the configuration, and a manifest of sizes and SHA-256. It is written under
another name and renamed when complete; it is removed by renaming it first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flowkern.checks import counted
from flowkern.train.config import ConfigError
from flowkern.train.durable import DELETED, PARTIAL, replace, set_aside, sync
from flowkern.train.errors import describe

MANIFEST = "manifest.json"
BEST = "best.json"  # of a run: the step whose validation was the best
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(path: Path) -> int:
    """N of checkpoint-N."""
    return int(_NAME.fullmatch(path.name)[1])


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def is_of_run(path: Path, output_dir: str | Path) -> bool:
    """Is it a checkpoint of that run, or in one?"""
    place, run = path.resolve(), Path(output_dir).resolve()
    inside = place.relative_to(run).parts if place.is_relative_to(run) else ()
    return bool(inside and _NAME.fullmatch(inside[0]))


def find_checkpoint(
    name: str, output_dir: str | Path = ".", key: str = "train.resume_from_checkpoint"
) -> Path | None:
    """The checkpoint called `name`: a directory, or "latest", the newest sound one of output_dir
    (None if it has none at all). What is passed over is named on stderr. key: whose value it is.

    Raises ConfigError for a directory that is no checkpoint or a broken one, and for "latest" where
    every checkpoint is broken.
    """
    if name != "latest":
        path = Path(name)
        if not any((path / file).is_file() for file in (MANIFEST, "state.pt")):
            raise ConfigError(
                f"{key}: {name!r} is no checkpoint; expected a directory checkpoint-N of a run, or "
                + ('"latest"' if key.startswith("train.") else "the run's own")
            )
        if fault := broken(path):
            raise ConfigError(f"{key}: {name!r} is broken: {fault}")
        return path
    faults = []
    for path in reversed(checkpoints(output_dir)):
        fault = broken(path)
        if fault is None:
            return path
        faults.append(f"{path} is broken: {fault}")
        print(f"{faults[-1]}; passed over", file=sys.stderr, flush=True)
    if faults:
        anew = "; train.overwrite_output_dir=true starts anew" if key.startswith("train.") else ""
        raise ConfigError(
            f"{key}: no checkpoint of {str(output_dir)!r} is whole: {faults[0]}{anew}"
        )
    return None


def chosen(place: Path, key: str = "checkpoint") -> Path:
    """A checkpoint's own directory, or of a run's its latest. Raises ConfigError for neither."""
    if not place.is_dir():
        raise ConfigError(f"{key}: there is no folder {str(place)!r}")
    if checkpoints(place):
        return find_checkpoint("latest", place, key)
    if (place / "run.lock").exists() or (place / "metrics.jsonl").exists():
        raise ConfigError(f"{key}: the run in {str(place)!r} has no checkpoint yet")
    return find_checkpoint(str(place), key=key)


def best_of(run: Path) -> Path:
    """The checkpoint that a run's best.json names. Raises ConfigError where it names none."""
    path = run / BEST
    try:
        step = int(json.loads(path.read_bytes())["step"])
    except FileNotFoundError:
        raise ConfigError(
            f"--best: there is no {str(path)!r}, which a run with validation.metric writes"
        ) from None
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"--best: {str(path)!r} is not what was written") from None
    return run / f"checkpoint-{step}"


def broken(directory: Path) -> str | None:
    """The first file that is not as it was written, and what is wrong with it; None: all are."""
    try:
        files = json.loads((directory / MANIFEST).read_bytes())["files"]
        entries = [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is not what was written"
    for name, size, digest in entries:
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {counted(path.stat().st_size, 'byte')} of {size}"
        if _digest(path) != digest:
            return f"{name} is not what was written (SHA-256)"
    return None


@contextmanager
def taking(directory: Path, key: str = "train.resume_from_checkpoint") -> Iterator[None]:
    """Around what reads a sound checkpoint: another version's, or one sealed by hand, may lack or
    hold anything, and the readers of its files raise of every kind. Raises ConfigError for that.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{key}: {str(directory)!r} cannot be used: {describe(error):.200}"
        ) from error


def write(
    output_dir: Path,
    step: int,
    fill: Callable[[Path], None],
    limit: int | None = None,
    kept: int | None = None,
) -> Path:
    """Make checkpoint-`step` of what `fill` writes into a directory, and remove the oldest others
    beyond `limit`, but for that of step `kept`.

    Raises OSError, of one line, where it cannot be written; nothing of it stays then.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    handled = sys.exception()
    try:
        partial.mkdir(parents=True)
        fill(partial)
        _seal(partial)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Writers in C++ say only that they failed; what the system said comes with it.
        context = error.__context__
        cause = context if isinstance(context, OSError) and context is not handled else error
        raise OSError(
            f"{final} cannot be written: {' '.join(str(cause).split())}; what was written of it "
            "is removed"
        ) from error
    doomed = [set_aside(final)] if final.exists() else []
    os.replace(partial, final)
    sync(output_dir)
    others = [path for path in checkpoints(output_dir) if step_of(path) not in (step, kept)]
    if limit is not None:
        doomed += [set_aside(path) for path in others[: max(0, len(others) + 1 - limit)]]
    _remove(doomed)
    return final


def _seal(directory: Path) -> None:
    """The manifest of a filled directory, and all of it on the disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(directory).as_posix(): {
            "size": path.stat().st_size,
            "sha256": _digest(path),
        }
        for path in files
    }
    for path in files:
        sync(path)
    replace(directory / MANIFEST, json.dumps({"files": manifest}, indent=1))
    for path in directory.rglob("*"):
        if path.is_dir():
            sync(path)


def discard(output_dir: Path, after: int = -1) -> None:
    """Remove the checkpoints of steps beyond `after`.

    The newest loses its name first: whenever this ends, the latest is one of the run as it was.
    """
    later = [path for path in reversed(checkpoints(output_dir)) if step_of(path) > after]
    doomed = [set_aside(path) for path in later]
    sync(output_dir)
    _remove(doomed)


def tidy(output_dir: Path) -> None:
    """Remove what a killed process left of checkpoints that were not there yet, or no longer."""
    for ending in (PARTIAL, DELETED):
        _remove(output_dir.glob(f"checkpoint-*{ending}"))


def _remove(directories: Iterable[Path]) -> None:
    for path in directories:
        shutil.rmtree(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
