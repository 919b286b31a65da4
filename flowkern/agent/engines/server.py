"""Turns drawn by a server that speaks in token ids: vLLM or SGLang, through /v1/completions, which
both have with the same fields.

The prompt goes there as ids and the turn comes back as ids with the log-probability of each, so
nothing is tokenised twice. What the server was asked and what it can do is tried when the engine is
made (features.py); how the weights get there is weights.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2

from flowkern.agent import network
from flowkern.agent.engines import Generation, Sampling
from flowkern.agent.engines.completion import turn
from flowkern.agent.engines.connection import KEY, Connection
from flowkern.agent.engines.features import Features
from flowkern.agent.engines.weights import Route, checksum, route
from flowkern.agent.network import FailedCall
from flowkern.checks import ConfigError


class ServerEngine:
    """Draws the planner's turns on a vLLM or SGLang server.

    options: `Options` as a mapping; model: what is trained, whose size of vocabulary and kind of
    weights are checked; tokenizer: of the prompt that the server is tried with; sampling: of
    training. Raises ConfigError, in a sentence that names the key, where there is no server, where
    it gives no token ids or log-probabilities, or others than those of what it draws from.
    """

    calls = 0
    is_exact = False

    @staticmethod
    def require(options: Mapping[str, Any]) -> None:
        """Raises ConfigError where there is no such server: before a model is loaded for it."""
        Connection(options).require()

    def __init__(
        self, options: Mapping[str, Any], *, model: Any, tokenizer: Any, sampling: Sampling
    ) -> None:
        self.server = Connection(options)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self._tokenizer = tokenizer
        self._route: Route = route(self.server, model)
        self._brought: tuple[Any, Any] = None, None  # which weights, and what the server calls them
        self.facts = asyncio.run(self._tried(sampling))

    async def _tried(self, sampling: Sampling) -> list[str]:
        try:
            async with self.server.client() as client:
                prompt = list(self._tokenizer.encode("The sum of 2 and 3 is"))
                found = await Features(self, client, prompt, sampling).tried()
        except FailedCall as error:
            raise ConfigError(f"{KEY}.url: {self.server.root}: {error}") from error
        return [f"turns are drawn by {self.server.serves} at {self.server.root}", *found]

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        """One turn per prompt; what fails is a `Generation.failed` with its reason.

        Raises RuntimeError where the server has lost the weights that were brought to it.
        """
        if not prompts:
            return []
        async with self.server.client() as client:
            try:
                model = await self._route.current(client)
            except FailedCall as error:
                return [Generation.failed(prompt, str(error)) for prompt in prompts]
            rows = zip(prompts, seeds, strict=True)
            return await asyncio.gather(
                *(self._row(client, model, list(ids), sampling, seed) for ids, seed in rows)
            )

    async def _row(
        self,
        client: httpx2.AsyncClient,
        model: Mapping[str, str],
        prompt: list[int],
        sampling: Sampling,
        seed: int,
    ) -> Generation:
        try:
            answer = await self.complete(client, model, prompt, sampling, seed)
            return turn(answer, prompt, sampling, self.vocabulary)
        except FailedCall as error:
            return Generation.failed(prompt, str(error))

    async def complete(
        self,
        client: httpx2.AsyncClient,
        model: Mapping[str, str],
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int,
        top: int = 1,
    ) -> Any:
        """The server's answer to one request; top: how many likeliest tokens it shall name.

        Everything that changes what is drawn is sent, as a server's defaults come from the model's
        generation_config.
        """
        body = {
            **model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(sampling.stop_ids),
            "seed": seed % 2**63,
            "logprobs": top,
            "return_token_ids": True,
        }
        if self.server.serves == "sglang":
            body["no_stop_trim"] = True  # else the id that ended the turn is left out
        return network.parsed(await self.server.ask(client, "POST", "/v1/completions", body))

    def sync(self, model: Any, directory: Path) -> None:
        """Brings the weights to the server, unless they are those that it has, and asks it whether
        it has them.

        Raises RuntimeError, of a line, where it has not.
        """
        try:
            asyncio.run(self._sync(model, directory))
        except FailedCall as error:
            raise RuntimeError(f"{self.server.root} did not take the weights: {error}") from error

    async def _sync(self, model: Any, directory: Path) -> None:
        found = checksum(p for p in model.parameters() if p.requires_grad)
        async with self.server.client() as client:
            if found == self._brought[0]:
                with suppress(RuntimeError):  # it has lost them
                    if await self._route.current(client) == self._brought[1]:
                        return
            await self._route.bring(client, model, self._tokenizer, directory)
            self._brought = found, await self._route.current(client)
