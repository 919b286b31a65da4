"""Prompt files, and which prompts an iteration takes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowkern.train.config import ConfigError

Prompt = dict[str, Any]
"""What a prompt file says of one: "prompt", its text, and metadata."""


def read_prompts(path: str | Path, key: str = "prompts", source: str | None = None) -> list[Prompt]:
    """Prompts {"prompt": ..., metadata} of a file, read as what its name ends in, in any case:

    .txt     one prompt per line
    .jsonl   one object per line (.ndjson too)
    .json    a list of objects, or of prompts
    .csv     a header with a column "prompt"; the others are metadata, as text

    Text is UTF-8, with a byte order mark or without; only a newline ends a line, so that what else
    Unicode counts as one stays in a prompt. Blank lines are passed over. An object that has no
    "prompt" has its text as "caption", as the lists of embeddings of DanceGRPO, MixGRPO and G2RPO.
    key: where a configuration has the path. source: where the file is published.
    Raises ConfigError naming it, the file and the line for what is no such file or prompt.
    """
    path, prompts = Path(path), []
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        *most, last = READERS
        raise ConfigError(f"{key}: got {str(path)!r}, expected {', '.join(most)} or {last}")
    try:
        for place, entry in reader(_text(path)):
            if isinstance(entry, dict) and "prompt" not in entry and "caption" in entry:
                entry = {"prompt": entry["caption"], **entry}
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
                raise ValueError(f'{place}: got {entry!r:.80}, expected a string "prompt"')
            require_text(entry["prompt"], place)
            prompts.append(entry)
        if not prompts:
            raise ValueError("no prompts in it")
    except OSError as error:
        why = error.strerror
        if isinstance(error, FileNotFoundError):
            why += "; a path is relative to the working directory"
            why += f", and the file is published at {source}" if source else ""
        raise ConfigError(f"{key}: cannot read {str(path)!r}: {why}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {str(path)!r}, {error}") from None
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


def _from_text(text: str) -> Iterator[tuple[str, Prompt]]:
    for number, line in _lines(text):
        yield f"line {number}", {"prompt": line.strip(" \t\r")}


def _from_json_lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(text):
        yield f"line {number}", _parsed(line, number)


def _from_json(text: str) -> Iterator[tuple[str, Any]]:
    entries = _parsed(text, 1) if text.strip() else []
    if not isinstance(entries, list):
        raise ValueError(f"line 1: got {entries!r:.80}, expected a list of objects or prompts")
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", {"prompt": entry} if isinstance(entry, str) else entry


def _from_csv(text: str) -> Iterator[tuple[str, Prompt]]:
    table = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    header: list[str] = []
    try:
        for row in table:
            place = f"line {table.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = row
                if "prompt" not in header or len({*header}) < len(header):
                    raise ValueError(
                        f'{place}: got columns {header}, expected a "prompt", each once'
                    )
            elif len(row) != len(header):
                raise ValueError(f"{place}: got {len(row)} cells, expected {len(header)}")
            else:
                yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {table.line_num}: {error}") from None


READERS = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".ndjson": _from_json_lines,
    ".json": _from_json,
    ".csv": _from_csv,
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
