"""Search over passages of one's own by BM25, in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowkern.agent.tools.output import ToolFailure
from flowkern.checks import ConfigError, is_integer, shown
from flowkern.extras import wanting

__all__ = ["Search", "read_passages"]

PASSAGES = 2_000_000


class Search:
    """Finds the passages of a corpus that share most words with a query (BM25, of bm25s).

    passages: a .jsonl file, each line a string or an object with `text` and perhaps `title`, or a
    list of such. top: so many are given, the best first; equal ones in their order. Raises
    ConfigError for what is no corpus, and where bm25s is not installed.
    """

    name = "search"
    in_caller = True
    """Its work is a few sums over the corpus: less, for most, than a thread takes to start."""

    def __init__(self, passages: str | Sequence[Any], top: int = 3) -> None:
        if not is_integer(top) or not 1 <= top <= 100:
            raise ConfigError(f"top: got {shown(top)}, expected a whole number from 1 to 100")
        try:
            import bm25s
        except ImportError as error:
            raise wanting("search", "bm25s") from error
        self.passages = read_passages(passages)
        self.top = top
        self._tokens = lambda texts: bm25s.tokenize(
            texts, stopwords="en", return_ids=False, show_progress=False
        )
        words = self._tokens(self.passages)
        if not any(words):
            raise ConfigError("passages: none of them has a word to search for")
        self._known = {word for row in words for word in row}
        self._index = bm25s.BM25()
        self._index.index(words, show_progress=False)

    def __call__(self, query: str) -> str:
        """Finds passages of the local collection that have the words of a query.

        Args:
            query: A few words that the passage has.
        """
        import numpy as np

        words = [word for word in self._tokens([query[:2_000]])[0] if word in self._known]
        scores = self._index.get_scores(words) if words else np.zeros(0)
        best = np.argsort(-scores, kind="stable")[: self.top]
        found = [self.passages[row] for row in best if scores[row] > 0]
        if not found:
            raise ToolFailure(f"nothing was found for {query[:100]!r}")
        return found[0] if len(found) == 1 else "\n".join(f"- {passage}" for passage in found)


def read_passages(passages: str | Sequence[Any]) -> list[str]:
    """Passages as texts, a title before its text. Raises ConfigError naming the file and line."""
    if isinstance(passages, (str, Path)):
        path = Path(passages)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"passages: {path} cannot be read: {error}") from error
        places = [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
        texts = [_text(_parsed(line, place), place) for place, line in places]
    else:
        texts = [_text(row, f"row {n}") for n, row in enumerate(passages, 1)]
    if not 0 < len(texts) <= PASSAGES:
        raise ConfigError(f"passages: got {len(texts)}, expected from 1 to {PASSAGES:,}")
    return texts


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"passages: {place}: not JSON: {shown(line)}") from error


def _text(row: Any, place: str) -> str:
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        title = row.get("title")
        return f"{title}: {row['text']}" if isinstance(title, str) and title else row["text"]
    if isinstance(row, str):
        return row
    raise ConfigError(
        f"passages: {place}: got {shown(row)}, expected a string, or an object with `text`"
    )
