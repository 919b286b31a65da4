"""Does an image show the text that its prompt asks for? Read by an OCR engine, compared as
flow_grpo does (arXiv 2505.05470).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from flowkern.checks import ConfigError, finite_number, shown, whole_number
from flowkern.lookup import load
from flowkern.rewards.frames import FrameReward

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Engine", "Ocr", "asked_text", "edit_distance", "text_match"]

Engine: TypeAlias = "Callable[[np.ndarray], Sequence[tuple[str, float]]]"
"""Reads an image (H, W, 3) of bytes in BGR -> [(line, how sure of it, 0 to 1)], in their order."""

RULES = ("flow_grpo", "verl_omni", "cosmos_rl")
UNQUOTED = ("nan", "prompt")


@dataclass(kw_only=True, eq=False)
class Ocr(FrameReward):
    """1 where the text of the prompt can be read in the image, down to 0 by the edit distance; NaN
    where a prompt asks for none. "exact" beside: 1 where all of it can be read.

    The text is metadata's "text" where that has it, else what stands first in quotes. Scores of two
    engines, or of two versions of one, are not to be compared: `version` says which it was.
    Raises ValueError that begins with the option at fault.
    """

    overlaps: ClassVar[bool] = True
    """It reads on the host, in a thread beside the network that draws."""
    takes_bytes: ClassVar[bool] = True

    rule: str = "flow_grpo"
    """What counts: see `text_match`."""
    unquoted: str = "nan"
    """What a prompt without quotes asks for: "nan" leaves it without a score, "prompt" takes all of
    it, as Flow-Factory does."""
    text_score: float = 0.5
    """Lines that the engine is less sure of are not read."""
    engine: Any = "rapidocr"
    """Its models are in its wheel, nothing is downloaded; or "module:attribute", or a callable, of
    the form of `Engine`."""
    threads: int | None = None
    """Of rapidocr, on the CPU; null: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in (("rule", RULES), ("unquoted", UNQUOTED)):
            if getattr(self, key) not in known:
                got = shown(getattr(self, key))
                raise ValueError(f"{key}: got {got}, expected one of {', '.join(known)}")
        finite_number("text_score", self.text_score, "0 to 1", lambda s: 0 <= s <= 1)
        if self.threads is not None:
            whole_number("threads", self.threads)
            if self.engine != "rapidocr":
                raise ValueError("threads: says how rapidocr runs, and engine is another")
        self._reading = Lock()  # an engine may keep what it works on
        if self.engine == "rapidocr":
            self._read, self.version = _rapidocr(self.threads or 1)
        else:
            self._read, self.version = _own(self.engine), shown(self.engine)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = images.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        scores = []
        for image, prompt, row in zip(pixels, prompts, metadata, strict=True):
            target = asked_text(prompt, row, self.unquoted)
            if target is None:
                warnings.warn(
                    f"ocr: no score without a text to look for; expected metadata['text'], or one "
                    f"in quotes in {prompt!r:.80}",
                    stacklevel=2,
                )
                scores.append(math.nan)
                continue
            with self._reading:
                lines = self._read(image)
            read = "".join(line for line, sure in lines if sure >= self.text_score)
            scores.append(text_match(read, target, self.rule))
        values = torch.tensor(scores, dtype=torch.float64)
        exact = torch.where(values.isnan(), values, (values == 1).double())
        return values, {"exact": exact}


def asked_text(prompt: str, metadata: Mapping[str, Any], unquoted: str = "nan") -> str | None:
    """What the image is to say: metadata["text"], else what is in the first pair of straight or
    curly quotes; None: nothing, and of unquoted="prompt" the prompt.
    """
    if isinstance(metadata.get("text"), str):
        return metadata["text"]
    found = re.search(r'"([^"]*)"|“([^”]*)”', prompt.replace('\\"', '"'))
    if found is None:
        return prompt if unquoted == "prompt" else None
    return found[1] if found[1] is not None else found[2]


def text_match(read: str, target: str, rule: str = "flow_grpo") -> float:
    """1 - distance / length: 1 where `target` is within what was read, else the edit distance, at
    most the target's length; capitals and spaces do not count. NaN for a target of none.

    rule: "flow_grpo"; "verl_omni" drops every whitespace, as line breaks, and an empty target asks
    for an image without text; "cosmos_rl" divides by the target's length with its spaces, so that
    what is missing weighs less.
    """
    if rule == "verl_omni":
        read, wanted = ("".join(text.split()).lower() for text in (read, target))
        if not wanted:
            return float(not read)
    else:
        read, wanted = (text.replace(" ", "").lower() for text in (read, target))
    if not wanted:
        return math.nan
    distance = 0 if wanted in read else min(edit_distance(read, wanted), len(wanted))
    return 1 - distance / len(target if rule == "cosmos_rl" else wanted)


def edit_distance(a: str, b: str) -> int:
    """Of Levenshtein: characters to insert, drop or replace."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            replaced = diagonal + (one != other)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _own(engine: Any) -> Engine:
    if isinstance(engine, str):
        try:
            engine = load(engine, {}, "engine")
        except ConfigError as error:
            raise ValueError(f"{error}, or rapidocr") from error
    if not callable(engine):
        raise ValueError(f"engine: got {shown(engine)}, expected a callable")
    return engine


def _installed() -> str:
    """The packages, with their versions."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in ("rapidocr", "onnxruntime"))
    except PackageNotFoundError as error:
        name = error.name or str(error)
        raise ValueError(f"engine: rapidocr needs {name}: pip install 'flowkern[ocr]'") from error


def _rapidocr(threads: int) -> tuple[Engine, str]:
    """The engine, which loads its models when it first reads, and what it is: packages and models.

    Raises ValueError where a package lacks.
    """
    packages = _installed()
    try:
        from rapidocr import RapidOCR
    except ImportError as error:  # of what it needs in turn: OpenCV, or a library of the system
        how = "pip install 'flowkern[ocr]'"
        raise ValueError(f"engine: rapidocr cannot be imported: {error}; {how}") from error

    engine = RapidOCR(
        params={
            "Global.text_score": 0.0,  # ours, the same of every engine
            "Global.use_cls": False,  # lines upside down are no text, as in flow_grpo
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )

    def read(image: np.ndarray) -> list[tuple[str, float]]:
        found = engine(image)
        texts = getattr(found, "txts", None)  # None: no text, as in a black image
        return [] if texts is None else list(zip(texts, found.scores, strict=True))

    models = [
        f"{part.ocr_version.value} {part.model_type.value}"
        for part in (engine.cfg.Det, engine.cfg.Rec)
    ]
    return read, f"{packages}, {' and '.join(dict.fromkeys(models))}"
