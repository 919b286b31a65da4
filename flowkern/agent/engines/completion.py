"""What an answer of /v1/completions says, as vLLM and SGLang give it: a turn token by token, or why
it is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowkern.agent.engines import Generation, Sampling
from flowkern.agent.network import FailedCall
from flowkern.checks import is_integer, shown


def turn(answer: Any, prompt: Sequence[int], sampling: Sampling, vocabulary: int) -> Generation:
    """The turn in a server's answer, or FailedCall: fewer ids than text, ids that there are not,
    another prompt than was sent."""
    found = Completion.of(answer)
    if found.prompt_ids != list(prompt):
        raise FailedCall("the server changed the prompt's token ids")
    if not found.ids:
        raise FailedCall("the turn has no token ids")
    if found.tokens is not None and found.tokens != len(found.ids):
        raise FailedCall(f"{len(found.ids)} token ids of a turn of {found.tokens} tokens")
    outside = [i for i in found.ids if not 0 <= i < vocabulary]
    if outside:
        raise FailedCall(f"token id {shown(outside[0])} of a vocabulary of {vocabulary}")
    if len(found.ids) > sampling.max_new_tokens:
        raise FailedCall(f"{len(found.ids)} tokens, {sampling.max_new_tokens} were asked for")
    if found.matched is not None and found.ids[-1] != found.matched:
        raise FailedCall(f"the token id {found.matched} that ended the turn is left out")
    log_probs = None if sampling.temperature == 0 else found.log_probs
    return Generation(list(prompt), found.ids, log_probs, found.finish)


@dataclass(frozen=True)
class Completion:
    """What an answer of /v1/completions says of its first choice."""

    prompt_ids: list[int]
    ids: list[int]
    log_probs: list[float]
    finish: Literal["stop", "length"]
    matched: int | None
    """The stop id that ended it, where the server says so."""
    tokens: int | None
    """How many it counted."""
    top: list[dict[str, float]]
    """Of each token, the likeliest and their log-probabilities."""

    @classmethod
    def of(cls, answer: Any) -> Completion:
        """Raises FailedCall, naming the field that is missing or wrong."""
        choice = _at(answer, "choices", 0)
        # vLLM has the prompt's ids at the top of a chat's answer, both have them per choice here.
        prompt_ids = _at(choice, "prompt_token_ids") or _at(answer, "prompt_token_ids")
        finish = _at(choice, "finish_reason")
        if finish not in ("stop", "length"):
            raise FailedCall(f"the turn ended by {shown(finish)}")
        ids = _ids(_at(choice, "token_ids"), "token_ids")
        log_probs = _at(choice, "logprobs", "token_logprobs")
        if not isinstance(log_probs, list) or not all(map(_is_log_prob, log_probs)):
            raise FailedCall("the answer has no log-probabilities (token_logprobs)")
        if len(log_probs) != len(ids):
            raise FailedCall(f"{len(ids)} token ids with {len(log_probs)} log-probabilities")
        matched = next(
            (m for key in ("stop_reason", "matched_stop") if is_integer(m := _at(choice, key))),
            None,
        )
        tokens = _at(answer, "usage", "completion_tokens")
        top = _at(choice, "logprobs", "top_logprobs")
        return cls(
            _ids(prompt_ids, "prompt_token_ids"),
            ids,
            [float(p) for p in log_probs],
            finish,
            matched,
            tokens if is_integer(tokens) else None,
            top if isinstance(top, list) else [],
        )


def _at(value: Any, *path: str | int) -> Any:
    """What lies at a path of keys; None where it does not."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(map(is_integer, value)):
        raise FailedCall(f"the answer has no token ids ({name})")
    return value


def _is_log_prob(value: Any) -> bool:
    """At most 0, but for rounding."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value <= 1e-3
