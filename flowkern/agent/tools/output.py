"""What a tool gives, as text for the planner's memory: bounded while it is made, never binary."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

__all__ = ["Output", "ToolFailure", "one_line"]

# All but tab and newline: a terminal's colours and a NUL say nothing to a planner.
CONTROLS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\ud800-\udfff]")


class ToolFailure(Exception):
    """A call of a tool failed; the message is the reason, one sentence for the planner.

    A tool of one's own may raise it. Whatever else it raises becomes a failure too, with its type.
    """


def one_line(reason: object, characters: int = 300) -> str:
    """A reason as memory and counts take it: on one line, and short."""
    text = " ".join(CONTROLS.sub(" ", str(reason)[: 4 * characters]).split())
    return text if len(text) <= characters else text[: characters - 3] + "..."


class Output:
    """Collects a tool's pieces, str, bytes (UTF-8) or anything json has a form for.

    `add` raises ToolFailure where there are more than `characters`, as soon as there are, or for
    bytes that are no text; `text` then is what had fitted.
    """

    def __init__(self, characters: int) -> None:
        self.characters = characters
        self._pieces: list[str] = []
        self._length = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, piece: Any) -> None:
        if isinstance(piece, (bytes, bytearray, memoryview)):
            self._write(self._decoded(bytes(piece)))
        elif isinstance(piece, str):
            self._write(piece)
        elif piece is not None:
            # Piece by piece, so that a huge list is not written before it is cut.
            for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(piece):
                self._write(part)

    def end(self) -> None:
        """After the last piece: raises ToolFailure where bytes stopped within a character."""
        self._write(self._decoded(b"", final=True))

    def _decoded(self, data: bytes, final: bool = False) -> str:
        # What is cut away need not be text.
        data = data[: 4 * (self.characters + 1)]
        if b"\0" in data:
            raise ToolFailure("the output is binary: it has NUL bytes")
        try:
            return self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            self._decoder.reset()
            raise ToolFailure("the output is binary: its bytes are no UTF-8 text") from error

    def _write(self, text: str) -> None:
        room = self.characters - self._length
        kept = CONTROLS.sub("", text[: room + 1].replace("\r\n", "\n"))
        self._pieces.append(kept[:room])
        self._length += len(kept[:room])
        if len(text) > room:
            raise ToolFailure(
                f"more than {self.characters:,} characters of output; the rest is cut"
            )
