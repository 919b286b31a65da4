"""Files of prompts, and which prompts an iteration takes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from flowkern.train.config import ConfigError

Prompt = dict[str, Any]
"""What a prompt file says of one: "prompt", its text, and metadata."""


@dataclass(frozen=True)
class Columns:
    """What of a row is used."""

    prompt: str | None = None
    """Its text; None: "prompt", or "caption" where there is none."""
    metadata: Sequence[str] | None = None
    """What rewards are given beside; None: all others."""

    def of(self, row: Any, place: str) -> Prompt:
        """A row as a prompt. Raises ValueError naming its place."""
        name = self.prompt or "prompt"
        if (
            self.prompt is None
            and isinstance(row, dict)
            and "prompt" not in row
            and "caption" in row
        ):
            row = {"prompt": row["caption"], **row}
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise ValueError(f'{place}: got {row!r:.80}, expected a string "{name}"')
        require_text(row[name], place)
        if self.metadata is None:
            rest = {k: v for k, v in row.items() if k != name} if self.prompt else row
        elif lacking := [column for column in self.metadata if column not in row]:
            raise ValueError(f"{place}: got {', '.join(row)}, expected {lacking[0]!r} too")
        else:
            rest = {column: row[column] for column in self.metadata}
        return {**rest, "prompt": row[name]} if rest is not row else row


def read_prompts(
    path: str | Path,
    key: str = "prompts",
    source: str | None = None,
    columns: Columns | None = None,
) -> list[Prompt]:
    """Prompts {"prompt": ..., metadata} of a file, read as what its name ends in, in any case:

    .txt     one prompt per line
    .jsonl   one object per line (.ndjson too)
    .json    a list of objects, or of prompts
    .csv     a header with a column "prompt"; the others are metadata, as text
    .parquet the same, with values of any type but bytes; takes pyarrow

    Text is UTF-8, with a byte order mark or without; only a newline ends a line, so that what else
    Unicode counts as one stays in a prompt. Blank lines are passed over. An object that has no
    "prompt" has its text as "caption", as the lists of embeddings of DanceGRPO, MixGRPO and G2RPO.
    key: where a configuration has the path. source: where the file is published. columns: which is
    the prompt and which are metadata, where it is not as above.
    Raises ConfigError naming it, the file and the line or row for what is no such file or prompt.
    """
    path, columns = Path(path), columns or Columns()
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        *most, last = READERS
        raise ConfigError(f"{key}: got {str(path)!r}, expected {', '.join(most)} or {last}")
    if path.suffix.lower() == ".txt" and columns != Columns():
        raise ConfigError(
            f"{key}: {str(path)!r} has lines and no columns; expected data.prompt_column and "
            "data.metadata_columns as null"
        )
    return checked(lambda: reader(path, columns), path, key, source)


def checked(
    read: Callable[[], Iterable[tuple[str, Prompt]]],
    path: str | Path,
    key: str,
    source: str | None = None,
) -> list[Prompt]:
    """The prompts of (place, prompt), at least one; see `read_prompts`."""
    try:
        prompts = [prompt for _, prompt in read()]
        if not prompts:
            raise ValueError("no prompts in it")
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        if isinstance(error, FileNotFoundError):
            why += "; a path is relative to the working directory"
            why += f", and the file is published at {source}" if source else ""
        raise ConfigError(f"{key}: cannot read {str(path)!r}: {why}") from None
    except ConfigError:  # which names its key
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {str(path)!r}, {' '.join(str(error).split())}") from None
    return prompts


def require_text(prompt: str, where: str) -> None:
    """Raise ValueError for half of a surrogate pair, which no tokenizer takes: JSON can have one as
    an escape, and a command line as a byte that is no UTF-8.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"{where}: {prompt!r:.80} has half of a surrogate pair")


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: byte {data[error.start]:#04x} is no UTF-8 text") from None
    if "\0" in text:
        raise ValueError(f"line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a NUL is no text")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


Rows = Iterator[tuple[str, Prompt]]


def _from_text(path: Path, columns: Columns) -> Rows:
    for number, line in _lines(_text(path)):
        place = f"line {number}"
        yield place, columns.of({"prompt": line.strip(" \t\r")}, place)


def _from_json_lines(path: Path, columns: Columns) -> Rows:
    for number, line in _lines(_text(path)):
        place = f"line {number}"
        yield place, columns.of(_parsed(line, number), place)


def _from_json(path: Path, columns: Columns) -> Rows:
    text = _text(path)
    entries = _parsed(text, 1) if text.strip() else []
    if not isinstance(entries, list):
        raise ValueError(f"line 1: got {entries!r:.80}, expected a list of objects or prompts")
    for number, entry in enumerate(entries, start=1):
        row = {columns.prompt or "prompt": entry} if isinstance(entry, str) else entry
        yield f"entry {number}", columns.of(row, f"entry {number}")


def _from_csv(path: Path, columns: Columns) -> Rows:
    table = csv.reader(io.StringIO(_text(path), newline="\n"), strict=True)
    header: list[str] = []
    try:
        for row in table:
            place = f"line {table.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = row
                _require_columns(header, columns, f"{place}: ")
            elif len(row) != len(header):
                raise ValueError(f"{place}: got {len(row)} cells, expected {len(header)}")
            else:
                yield place, columns.of(dict(zip(header, row, strict=True)), place)
    except csv.Error as error:
        raise ValueError(f"line {table.line_num}: {error}") from None


def _require_columns(there: Sequence[str], columns: Columns, place: str = "") -> None:
    wanted = [columns.prompt or "prompt", *(columns.metadata or ())]
    lacking = next((name for name in wanted if name not in there), None)
    if lacking is not None or len({*there}) < len(there):
        raise ValueError(
            f'{place}got columns {[*there]}, expected a "{lacking or wanted[0]}", each once'
        )


def _from_parquet(path: Path, columns: Columns) -> Rows:
    if find_spec("pyarrow") is None:
        raise ValueError("which takes pyarrow: pip install 'flowkern[data]'")
    import pyarrow.parquet

    with path.open("rb") as file:  # a directory is said to be one
        yield from from_table(pyarrow.parquet.ParquetFile(file), columns)


def from_table(table: Any, columns: Columns) -> Rows:
    """Of a pyarrow table, or a parquet file: of the columns that are used, which hold no bytes."""
    import pyarrow.types as types

    schema = getattr(table, "schema_arrow", None) or table.schema

    def has_bytes(kind: Any) -> bool:
        inner = [kind.field(i).type for i in range(kind.num_fields)]
        is_bytes = types.is_binary(kind) or types.is_large_binary(kind)
        return is_bytes or any(map(has_bytes, inner))

    plain = Columns("caption", columns.metadata) if _has_caption(schema.names, columns) else columns
    _require_columns(schema.names, plain)
    used = [field.name for field in schema if not has_bytes(field.type)]
    if columns.metadata is not None:
        used = [plain.prompt or "prompt", *columns.metadata]
    read = table.read(used) if hasattr(table, "read") else table.select(used)
    for number, row in enumerate(read.to_pylist(), start=1):
        yield f"row {number}", columns.of(row, f"row {number}")


def _has_caption(names: Collection[str], columns: Columns) -> bool:
    return columns.prompt is None and "prompt" not in names and "caption" in names


READERS: dict[str, Callable[[Path, Columns], Rows]] = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".ndjson": _from_json_lines,
    ".json": _from_json,
    ".csv": _from_csv,
    ".parquet": _from_parquet,
}


def _parsed(text: str, line: int) -> Any:
    """JSON that begins in `line`."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg} at column {error.colno}"
        raise ValueError(f"line {line - 1 + error.lineno}: {message}") from None
    except RecursionError:
        raise ValueError(f"line {line}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> Prompt:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{twice!r} is there twice")
    return found


def draw_prompts(available: int, count: int, seed: int, iteration: int) -> list[int]:
    """The places of `count` prompts of `available`; follows from seed and iteration alone.

    Raises ConfigError where there are too few.
    """
    if count > available:
        raise ConfigError(
            f"algorithm.prompts_per_rollout: got {count}, expected at most the {available} of "
            "data.train_prompts"
        )
    return np.random.default_rng([seed, iteration]).permutation(available)[:count].tolist()
