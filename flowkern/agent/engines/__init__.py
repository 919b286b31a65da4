"""Where a planner's turns are generated: here, or on a server that speaks in token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

ENGINES = {
    "transformers": "flowkern.agent.engines.transformers:TransformersEngine",
    "server": "flowkern.agent.engines.server:ServerEngine",
}
"""By the name that `agent.engine.kind` has; or "module:attribute" of one's own."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0: the likeliest token, greedily."""
    top_p: float = 1.0
    """The least likely tokens are left out beyond this share; 1: none is."""
    max_new_tokens: int = 2048
    stop_ids: Collection[int] = ()
    """A turn ends with the first of these, which is its last token."""


@dataclass(frozen=True)
class Generation:
    """A turn as it was drawn, token by token: nothing is ever tokenised again."""

    prompt_ids: list[int]
    ids: list[int]
    """The stop token included, where there was one."""
    log_probs: list[float] | None
    """Of each of `ids`, under the distribution that it was drawn from; None: greedy, or failed."""
    finish: Literal["stop", "length", "failed"]
    failure: str | None = None
    """In a line, why there is no turn; then `ids` is empty."""

    @classmethod
    def failed(cls, prompt_ids: Sequence[int], reason: str) -> Generation:
        return cls(list(prompt_ids), [], None, "failed", reason)


class Engine(Protocol):
    """Draws the turns of many trajectories at once.

    One of ENGINES is built as ``kind(options, model=..., tokenizer=..., sampling=...)``: options
    the mapping `agent.engine` without its kind, model the `nn.Module` that is trained (a server
    needs it for `sync` only), sampling the one of training. It raises ConfigError, naming
    agent.engine.KEY, for what it cannot use; one that has a static `require(options)` does so
    there, before the model is loaded, as far as it can.
    """

    facts: Sequence[str]
    """What a run says of it when it begins, in lines."""
    calls: int
    """Rows that went through the network in this process; 0 where it is elsewhere."""
    is_exact: bool
    """Are its log-probs the trainer's own, of the same weights to a few ulp? Else the trainer
    computes the old ones itself, and corrects for the difference."""

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        """One turn per prompt, in their order. A row is a function of its prompt, the sampling, its
        seed (63 bits) and the weights. What goes wrong with one row is its `failure`."""
        ...

    def sync(self, model: Any, directory: Path) -> None:
        """Called before each rollout and each evaluation, by the main process: an engine that has
        weights elsewhere brings them there, through files in `directory` where it needs any, unless
        it has these. Raises RuntimeError, of a line, where it cannot."""
        ...
