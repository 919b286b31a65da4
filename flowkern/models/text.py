"""What families share of text: how long it is, a row for each prompt, where rows are kept."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowkern.models import Conditioning, hub
from flowkern.models.directory import (
    ENCODER,
    TOKENIZER,
    cannot_be_loaded,
    check_template,
    check_vocabulary,
    load_encoders,
)
from flowkern.models.encoded import Encoded, InFolder, InMemory, Parts, content_of

REMEMBERED = 1024  # prompts, megabytes each, where nobody said which there will be


class Text(ABC):
    """The side of a pipeline that encodes prompts."""

    lengths: ClassVar[range] = range(1, 513)
    """Tokens of a prompt that the text encoder takes."""
    stays: ClassVar[tuple[str, ...]] = ()
    """Parts of a `Conditioning` that stay on the host."""
    pipeline: Any
    directory: Path | None
    """Where the pipeline was loaded from; None: it was made in memory."""
    base: str
    revision: str | None
    text_dtype: torch.dtype
    """What the text encoders of a directory compute in."""
    _left_out: torch.device | str | None = None
    """Where text encoders belong that are not loaded yet."""

    def __init__(self, max_sequence_length: int | None) -> None:
        """max_sequence_length: tokens of a prompt; None: the family's own, or those of `fit`.

        Raises ValueError for a length that the text encoder does not have.
        """
        length = self.own_length() if max_sequence_length is None else max_sequence_length
        if length not in self.lengths:
            least, most = self.lengths[0], self.lengths[-1]
            raise ValueError(f"max_sequence_length: got {length}, expected {least} to {most}")
        self.max_sequence_length = length
        self._is_asked, self._is_fitted = max_sequence_length is not None, False
        self._is_released = False
        self._encoded: Encoded = InMemory(REMEMBERED)

    # ---- what an adapter says ----

    def own_length(self) -> int:
        """Tokens of a prompt where nothing else is asked for."""
        return self.lengths[-1]

    @property
    def template(self) -> str:
        """What is put around a prompt, where that is the pipeline's own and no code's."""
        return ""

    def conversation(self, prompt: str) -> list[dict[str, Any]] | None:
        """What a tokenizer's own template makes a text of, where the pipeline takes it; None: it
        does without."""
        return None

    def tokens_of(self, prompts: Sequence[str]) -> list[int] | None:
        """The tokens of each, where a network looks at no others; None: it looks at padding."""
        return None

    def blank(self) -> dict[str, Tensor]:
        """The parts of an encoded prompt of full length, (1, ...) each, without values: on the meta
        device, but for what stays on the host.

        Raises ValueError for a family that chooses by what is in them.
        """
        raise ValueError(f"path: a {type(self).__name__} chooses by the values of its text")

    @abstractmethod
    def encode_rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The parts of a `Conditioning`, (B, ...) each."""

    # ---- what they share ----

    def fit(self, prompts: Sequence[str]) -> None:
        """Make `max_sequence_length`, where it was not asked for, the least multiple of 16 that
        holds these prompts: all of a run, with the negative one. Where a network looks at padding,
        its length is a part of the model, and stays.

        Raises ValueError for no prompts, or one that no length of the family holds.
        """
        if not prompts:
            raise ValueError("prompts: got none, expected at least one")
        tokens = None if self._is_asked else self.tokens_of(prompts)
        if tokens is None:
            return
        longest, most = max(tokens), self.lengths[-1]
        if longest > most:
            prompt = prompts[tokens.index(longest)]
            raise ValueError(
                f"prompts: {prompt!r:.80} has {longest} tokens, expected at most {most}"
            )
        self.max_sequence_length = min(most, -(-longest // 16) * 16)
        self._is_fitted = True

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts as rows on the host.

        Each distinct prompt is encoded once, by itself, so that its row does not depend on others,
        and remembered: the latest 1,024, or those of `prepare`.
        Raises TypeError for what is no list of strings, ValueError for no prompts, or one that is
        longer than those of `fit`, or new after `prepare`; and as `load_encoders`.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts: got the string {prompts!r}, expected a list of strings")
        if not prompts:
            raise ValueError("prompts: got none, expected at least one")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts: got {prompts!r:.80}, expected a list of strings")
        distinct = dict.fromkeys(prompts)
        rows = {prompt: Conditioning(self._row(prompt), self.stays) for prompt in distinct}
        return Conditioning.cat([rows[prompt] for prompt in prompts])

    @torch.no_grad()
    def _row(self, prompt: str) -> Parts:
        length = self.max_sequence_length
        parts = self._encoded.get(prompt, length)
        if parts is not None:
            return parts
        if self._is_released:
            raise ValueError(f"prompts: {prompt!r:.80} is new, and the encoders are released")
        if self._is_fitted and max(self.tokens_of([prompt])) > length:
            raise ValueError(
                f"prompts: {prompt!r:.80} is longer than those that the model was fitted to, of "
                f"{length} tokens"
            )
        self.load_encoders()
        parts = Conditioning(self.encode_rows([prompt])).to("cpu").parts
        self._encoded.put(prompt, length, parts)
        return parts

    def prepare(self, prompts: Sequence[str], folder: str | Path | None = None) -> None:
        """Encode all that will be asked for, each once, and free the text encoders.

        folder: where rows are kept, and found again by other runs; None: in the host's memory.
        Raises ValueError where that does not hold them, or for a folder and a pipeline that was
        made in memory, whose rows nothing tells from another's; OSError where it cannot be written;
        and as `load_encoders`, for the first prompt that it has no row of.
        """
        distinct = list(dict.fromkeys(prompts))
        if folder is not None:
            self._encoded = InFolder(folder, self._origin(Path(folder)))
        elif isinstance(self._encoded, InMemory):
            self._encoded.limit = None
        for number, prompt in enumerate(distinct):
            parts = self._row(prompt)
            if number == 0 and folder is None:
                _require_memory(len(distinct), sum(part.nbytes for part in parts.values()))
        self.release_encoders()

    def _origin(self, folder: Path) -> dict[str, Any]:
        """All that a row follows from, its prompt and length left out."""
        import diffusers
        import transformers

        if self.directory is None:
            raise ValueError("prompt_cache: the model was made in memory; expected a directory's")
        content = self.revision or content_of(self.directory, folder)
        return {
            "family": type(self).__name__,
            "content": content,
            "template": self.template,
            "dtype": str(self.text_dtype),
            "made by": [diffusers.__version__, transformers.__version__],
        }

    def load_encoders(self) -> None:
        """Have the text encoders, where they were left out when the model was loaded.

        Raises FileNotFoundError where they are not there, ValueError where they are not whole or
        the tokenizers are made for others.
        """
        if self._left_out is None:
            return
        try:
            if self.revision is not None:
                hub.directory_of(self.base, self.revision)
            found = load_encoders(self.directory, self.text_dtype)
            for name, encoder in found.items():
                tokenizer = name.replace(ENCODER, TOKENIZER, 1)
                words = self.pipeline.components.get(tokenizer)
                check_vocabulary(tokenizer, words, encoder)
                check_template(tokenizer, words, self.conversation)
                encoder.to(self._left_out).eval().requires_grad_(False)
        except (ImportError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            message = cannot_be_loaded(self.base, error, ("path", "revision"))
            raise kind(message) from error
        self.pipeline.register_modules(**found)
        self._left_out = None

    def release_encoders(self) -> None:
        """Free the text encoders; what was encoded stays."""
        self._is_released = True
        names = [name for name in self.pipeline.components if name.startswith("text_encoder")]
        self.pipeline.register_modules(**dict.fromkeys(names))


def _require_memory(count: int, size: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if count * size > memory:
        raise ValueError(
            f"prompt_cache: {count} encoded prompts are {count * size / 1e9:.0f} GB, and this "
            f"machine has {memory / 1e9:.0f} GB of memory; expected a folder to keep them in"
        )
