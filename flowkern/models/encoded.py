"""Encoded prompts: on the host, or in a folder that runs share.

A file of the folder is called after all that its row was made of, and holds a digest of its name
and content. One that is broken, cut short or another's counts as not there, and is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load, save
from torch import Tensor

from flowkern.models.directory import ENCODER, INDEX, TOKENIZER, text_encoders

Parts = Mapping[str, Tensor]
"""One row of every part of a `Conditioning`, (1, ...) each, on the host."""
DIGEST = 32  # bytes of a SHA-256


class Encoded(Protocol):
    """length: of the text, in tokens, of which a row is too."""

    def get(self, prompt: str, length: int) -> Parts | None: ...

    def put(self, prompt: str, length: int, parts: Parts) -> None: ...


class InMemory:
    """The latest `limit` rows, in memory; None: all."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._rows: OrderedDict[tuple[str, int], Parts] = OrderedDict()

    def get(self, prompt: str, length: int) -> Parts | None:
        return self._rows.get((prompt, length))

    def put(self, prompt: str, length: int, parts: Parts) -> None:
        self._rows[prompt, length] = parts
        while self.limit is not None and len(self._rows) > self.limit:
            self._rows.popitem(last=False)


class InFolder:
    """Rows as files, for as many processes as like: a file is there as a whole or not at all."""

    def __init__(self, folder: str | Path, origin: Mapping[str, Any]) -> None:
        """origin: what rows are made by, in plain values: another's are never taken for it."""
        self.folder, self.origin = Path(folder), dict(origin)

    def _file(self, prompt: str, length: int) -> Path:
        key = json.dumps([self.origin, prompt, length], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def get(self, prompt: str, length: int) -> Parts | None:
        file = self._file(prompt, length)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        digest, body = content[:DIGEST], content[DIGEST:]
        return load(body) if digest == _digest(file, body) else None

    def put(self, prompt: str, length: int, parts: Parts) -> None:
        """Raises OSError where the folder cannot be written; nothing of the row stays then."""
        file = self._file(prompt, length)
        body = save({name: part.contiguous() for name, part in parts.items()})
        file.parent.mkdir(parents=True, exist_ok=True)
        with _at_once(file) as partial:
            partial.write_bytes(_digest(file, body) + body)


def _digest(file: Path, body: bytes) -> bytes:
    found = hashlib.sha256(file.name.encode())
    found.update(body)
    return found.digest()


@contextmanager
def _at_once(file: Path) -> Iterator[Path]:
    """A place beside a file, of this writer alone, whose content takes the file's name."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def content_of(directory: Path, folder: Path) -> str:
    """A digest of what a pipeline directory encodes text with.

    folder: of rows, where a mark says what the encoders of an index and of tokenizers are, and by
    which files, with their sizes and times, that was found: gigabytes are not read again, and need
    not be there.
    Raises FileNotFoundError where they are not there and the marks are not of one directory's.
    """
    light, heavy = _files(directory, INDEX, TOKENIZER), _files(directory, ENCODER)
    marks = folder / "models" / _content(light)
    missing = [name for name in text_encoders(directory) if not _files(directory, f"{name}/")]
    if missing:
        known = {mark.name.partition(".")[0] for mark in marks.glob("*.*")}
        if len(known) == 1:
            return known.pop()
        raise FileNotFoundError(
            f"path: {str(directory)!r} lacks {missing[0]}/, and {str(folder)!r} has prompts of "
            f"{len(known)} directories with this index and these tokenizers, expected of one"
        )
    files = [(str(file.resolve()), file.stat()) for file in heavy.values()]
    stamps = [[at, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for at, s in files]
    stamp = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    for mark in marks.glob(f"*.{stamp}"):
        return mark.name.partition(".")[0]
    found = _content(light | heavy)
    with suppress(OSError):  # of a folder that is only read, or cannot be: `put` says so
        marks.mkdir(parents=True, exist_ok=True)
        (marks / f"{found}.{stamp}").touch()
    return found


def _files(directory: Path, *beginnings: str) -> dict[str, Path]:
    """Those of a directory whose names begin with one of these, by their names, in order."""
    files = (file for file in directory.rglob("*") if file.is_file())
    named = {file.relative_to(directory).as_posix(): file for file in files}
    return {name: named[name] for name in sorted(named) if name.startswith(beginnings)}


def _content(files: Mapping[str, Path]) -> str:
    found = hashlib.sha256()
    for name, file in files.items():
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        found.update(json.dumps([name, digest]).encode())
    return found.hexdigest()
