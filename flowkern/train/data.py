"""The prompts of a configuration: a file, a directory of files, or a data set of the hub; which of
its columns is the prompt, and which are metadata.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowkern.checks import ConfigError, shown
from flowkern.lookup import is_hub_id
from flowkern.models.hub import no_answer
from flowkern.train.errors import describe
from flowkern.train.fields import is_file
from flowkern.train.prompts import READERS, Columns, Prompt, checked, from_table, read_prompts

if TYPE_CHECKING:
    from flowkern.train.config import DataConfig

SPLITS = {"train_prompts": "train", "test_prompts": "test"}
"""Of a data set, where none is named."""


def prompts_of(data: DataConfig, which: str) -> list[Prompt]:
    """Of `which`, "train_prompts" or "test_prompts"; none where it is None.

    Raises ConfigError naming its key, the file or the data set, and the line or the row.
    """
    path, key = getattr(data, which), f"data.{which}"
    if path is None:
        return []
    columns = Columns(data.prompt_column, data.metadata_columns)
    if is_file(path):
        return read_prompts(path, key, data.source, columns)
    return checked(lambda: from_table(_loaded(*_place(data, which)), columns), path, key)


def digest_of(data: DataConfig, which: str) -> str | None:
    """SHA-256 of what `prompts_of` reads: of a file its bytes, of a data set its prompts."""
    path = getattr(data, which)
    if path is None:
        return None
    if is_file(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return _digest(*_place(data, which), data.prompt_column)


def _place(data: DataConfig, which: str) -> tuple[str, str | None, str, str | None, str]:
    split = getattr(data, which.replace("prompts", "split")) or SPLITS[which]
    key = f"data.{which}"
    return getattr(data, which), data.dataset_config_name, split, data.revision, key


@cache
def _digest(path: str, name: str | None, split: str, revision: str | None, key: str,
            column: str | None) -> str:  # fmt: skip
    table = _loaded(path, name, split, revision, key)
    prompts = checked(lambda: from_table(table, Columns(column, ())), path, key)
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


@cache
def _loaded(path: str, name: str | None, split: str, revision: str | None, key: str) -> Any:
    """The pyarrow table of a split. From the cache where the hub gives no answer."""
    if find_spec("datasets") is None:
        raise ConfigError(
            f"{key}: got {shown(path)}, a data set or a directory, which takes datasets: "
            f"pip install 'flowkern[data]'; or a file, {', '.join(READERS)}"
        )
    import datasets

    datasets.disable_progress_bars()
    why = no_answer() if is_hub_id(path) else None
    asks = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = asks or why is not None
    try:
        found = datasets.load_dataset(path, name, split=split, revision=revision)
    except Exception as error:  # of every kind, some without a word
        if why is not None and isinstance(error, ConnectionError):
            why = f"{shown(path)} is not in the cache of data sets, and {why}"
        else:
            why = f"{shown(path)}, split {split!r}: {describe(error):.400}"
        raise ConfigError(f"{key}: {why}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = asks
    if why is not None and revision is not None:
        _require_revision(found, path, revision, why, key)
    return found.data.table


def _require_revision(found: Any, path: str, revision: str, why: str, key: str) -> None:
    """Of its cache `datasets` takes the newest version, whichever was asked for."""
    commits = {Path(file["filename"]).parent.name for file in found.cache_files}
    if commits != {revision}:
        raise ConfigError(
            f"{key}: {shown(path)} is in the cache of data sets as {', '.join(sorted(commits))}, "
            f"data.revision is {revision!r}, and {why}"
        )
