"""Can this server draw turns that a planner is trained on? It is asked, before the run begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowkern.agent.engines import Sampling
from flowkern.agent.engines.completion import Completion, turn
from flowkern.agent.network import FailedCall
from flowkern.checks import ConfigError

if TYPE_CHECKING:
    import httpx2

    from flowkern.agent.engines.server import ServerEngine

TOP = 5
SLACK = 0.02
"""By which a gap between log-probabilities may be off: servers compute in 16 bits."""
IMPOSSIBLE = -1e3  # what servers write for minus infinity

HOW = {
    "vllm": "vLLM 0.11 or later has them (return_token_ids)",
    "sglang": "SGLang 0.5.10 or later has them (return_token_ids)",
}
PROCESSED = {
    "vllm": "start vLLM with --logprobs-mode processed_logprobs",
    "sglang": "start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB",
}


class Features:
    """Small requests whose answers tell whether token ids, log-probabilities, temperature and top_p
    are what a run needs."""

    def __init__(
        self,
        engine: ServerEngine,
        client: httpx2.AsyncClient,
        prompt: list[int],
        sampling: Sampling,
    ) -> None:
        self._engine, self._server = engine, engine.server
        self._client, self._prompt, self._sampling = client, prompt, sampling

    async def tried(self) -> list[str]:
        """What was found, in lines. Raises ConfigError in a sentence for what a run cannot use, and
        FailedCall for a server that does not answer."""
        plain = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=4)
        one = await self._turn(plain, seed=1)
        again = await self._turn(plain, seed=1)
        await self._temperature(one)
        await self._top_p()
        same = "the same turn" if one["ids"] == again["ids"] else "not always the same turn"
        return [f"the same seed gives {same} there"]

    async def _turn(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        model = {"model": self._server.options.model}
        answer = await self._engine.complete(
            self._client, model, self._prompt, sampling, seed, top=TOP
        )
        try:
            turn(answer, self._prompt, sampling, self._engine.vocabulary)
            found = Completion.of(answer)
        except FailedCall as error:
            how = HOW[self._server.serves]
            raise ConfigError(
                f"agent.engine.url: {self._server.root} cannot be trained with: {error}; {how}"
            ) from error
        return {"ids": found.ids, "log_probs": found.log_probs, "top": _values(found.top)}

    async def _temperature(self, one: Mapping[str, Any]) -> None:
        """At temperature T the gap between two log-probabilities is that at 1 divided by T."""
        temperature = self._sampling.temperature
        if temperature in (0.0, 1.0):
            return
        other = await self._turn(
            Sampling(temperature=temperature, top_p=1.0, max_new_tokens=4), seed=1
        )
        gap, scaled = _gap(one["top"]), _gap(other["top"])
        wanted = gap / temperature
        if abs(scaled - wanted) > SLACK * (1 + wanted):
            raise ConfigError(
                f"agent.engine.url: {self._server.root} gives log-probabilities that are not those "
                f"of temperature {temperature}: {PROCESSED[self._server.serves]}, or set "
                "algorithm.temperature=1"
            )

    async def _top_p(self) -> None:
        """With next to no share left, the likeliest token is drawn, and its probability is 1."""
        if self._sampling.top_p == 1:
            return
        narrow = Sampling(temperature=1.0, top_p=1e-3, max_new_tokens=1)
        turns = [await self._turn(narrow, seed) for seed in range(3)]
        if len({turn["ids"][0] for turn in turns}) > 1:
            problem = "leaves top_p out of account"
        elif any(turn["log_probs"][0] < -SLACK for turn in turns):
            problem = "gives log-probabilities from before top_p"
        else:
            return
        raise ConfigError(
            f"agent.engine.url: {self._server.root} {problem}: "
            f"{PROCESSED[self._server.serves]}, or set algorithm.top_p=1"
        )


def _values(top: list[dict[str, float]]) -> list[float]:
    """The likeliest log-probabilities of the first token, in falling order."""
    first = top[0] if top and isinstance(top[0], dict) else {}
    return sorted((v for v in first.values() if v > IMPOSSIBLE), reverse=True)[:TOP]


def _gap(values: list[float]) -> float:
    if len(values) < 2:
        raise ConfigError(
            "agent.engine.url: the server does not name the likeliest tokens (top_logprobs), so "
            "that its temperature cannot be checked; set algorithm.temperature=1"
        )
    return values[0] - values[-1]
