"""The files of a reward's network: a directory, or an id of the hub; read without running them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

from flowkern.lookup import is_hub_id
from flowkern.models import hub

__all__ = [
    "DTYPES",
    "commits",
    "device_of",
    "dtype_of",
    "file_of",
    "folder_of",
    "linear_layers",
    "read_state",
    "reading",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of the option dtype."""


def dtype_of(name: str) -> torch.dtype:
    """Raises ValueError, naming dtype, for one that is none of DTYPES."""
    if name not in DTYPES:
        raise ValueError(f"dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


_COMMITS: ContextVar[dict[str, str] | None] = ContextVar("commits", default=None)


@contextmanager
def commits() -> Iterator[dict[str, str]]:
    """What ids of the hub were when `folder_of` was asked for them within: id -> commit."""
    found: dict[str, str] = {}
    before = _COMMITS.set(found)
    try:
        yield found
    finally:
        _COMMITS.reset(before)


def folder_of(path: str, revision: str | None, wanted: Sequence[str], key: str = "path") -> Path:
    """A directory here, or that of an id in the hub's cache, where what is not there yet is
    downloaded.

    path: a directory, OWNER/NAME, or OWNER/NAME@REVISION. wanted: a file that there must be, then
    patterns of others. key: the option that has the path. Raises FileNotFoundError or OSError, of
    one line that begins with the option, where there is no such model, and ValueError for a
    directory with a revision, and for two revisions.
    """
    name, at, own = path.partition("@")
    if at and own and is_hub_id(name) and not Path(path).is_dir():
        if revision is not None:
            raise ValueError(f"revision: got {revision!r} beside {path!r}, expected one of the two")
        path, revision = name, own
    if is_hub_id(path):
        try:
            found = hub.folder_of(path, revision, wanted)
        except OSError as error:
            option, _, why = str(error).partition(": ")
            raise type(error)(f"{key if at or option == 'path' else option}: {why}") from None
        if (noted := _COMMITS.get()) is not None:
            noted[path] = found.name
        return found
    if revision is not None:
        raise ValueError(
            f"revision: got {revision!r}, but {path!r} is a directory; expected an id of the hub"
        )
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"{key}: {path!r} is no directory here and no id of the hub, OWNER/NAME"
        )
    if not (Path(path) / wanted[0]).is_file():
        raise FileNotFoundError(f"{key}: {path!r} has no {wanted[0]}")
    return Path(path)


def file_of(path: str, revision: str | None, name: str, key: str = "path") -> Path:
    """`path` itself where it is a file, else the file `name` of that directory or id. Raises as
    `folder_of`.
    """
    if Path(path).is_file() and revision is None:
        return Path(path)
    return folder_of(path, revision, [name], key) / name


@contextmanager
def reading(key: str, folder: Path) -> Iterator[None]:
    """What others raise over the files of a directory, of every kind, becomes a ValueError of one
    line that begins with the option `key`.
    """
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{key}: "):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{key}: {str(folder)!r} cannot be read: {why:.200}") from error


def read_state(file: Path, key: str = "path") -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote, on the CPU; those under
    "state_dict", where the file has that. A pickle that names more than tensors is refused.

    Raises ValueError, of one line that begins with the option `key`, for a file of another kind.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        mapped = zipfile.is_zipfile(file)  # older files are read as a whole
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of every kind, and of many lines
        why = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{key}: {str(file)!r} holds no weights: {why:.200}") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{key}: {str(file)!r} holds no tensors by their names")
    return found


def device_of(name: str | None) -> torch.device | None:
    """Raises ValueError, naming device, for one that is none, or not here. None: no choice."""
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"device: got {name!r}, which is not here: {why:.120}") from None


def linear_layers(state: Mapping[str, Tensor], prefix: str, width: int, key: str) -> nn.Sequential:
    """A head that is linear layers one after another, as they are numbered in a checkpoint; what
    lay between in training (dropout) does nothing here. Float32, frozen.

    Raises ValueError, naming the option `key`, for other layers, or ones that do not go from
    `width` values to one.
    """
    named = (re.fullmatch(rf"{re.escape(prefix)}(\d+)\.weight", name) for name in state)
    numbers = sorted(int(name[1]) for name in named if name)
    found = nn.Sequential()
    wide = width
    for number in numbers:
        weight = state[f"{prefix}{number}.weight"]
        bias = state.get(f"{prefix}{number}.bias")
        if weight.shape[1:] != (wide,) or bias is None:
            break
        wide = len(weight)
        layer = nn.Linear(*weight.T.shape, dtype=torch.float32)
        layer.load_state_dict({"weight": weight, "bias": bias})
        found.append(layer)
    if len(found) < max(len(numbers), 1) or wide != 1:
        raise ValueError(
            f"{key}: its layers {prefix}N do not go from {width} values of a feature to one score"
        )
    return found.eval().requires_grad_(False)
