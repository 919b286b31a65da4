"""Where the server of a planner listens, what it is asked with, and whether it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import httpx2

from flowkern.agent import network
from flowkern.agent.clients import as_patience
from flowkern.agent.network import Caller, FailedCall, Patience
from flowkern.checks import ConfigError, shown
from flowkern.lookup import nearest

KEY = "agent.engine"


@dataclass(frozen=True)
class Options:
    """`agent.engine`, without its kind."""

    url: str
    """Of the server's root: http://HOST:8000."""
    model: str
    """As the server calls what it was started with (vLLM: --served-model-name, or its path)."""
    serves: str
    """ "vllm" or "sglang"."""
    weights: str = "lora"
    """How they get there: "lora" (both) loads an adapter, "disk" (SGLang) all weights; each from a
    folder that the server reads too."""
    name: str = "flowkern"
    """What adapters are called there, before their number: one run, one name."""
    folder: str | None = None
    """Where weights are written for the server; None: in the run's directory."""
    folder_on_server: str | None = None
    """What the server calls that folder; None: the same."""
    token_env: str | None = None
    """The environment variable that has the server's token."""
    patience: Any = None
    """See network.Patience: timeout_s, deadline_s, retries, backoff_s, concurrency, max_bytes."""

    def __post_init__(self) -> None:
        for key, known in {"serves": ("vllm", "sglang"), "weights": ("lora", "disk")}.items():
            if getattr(self, key) not in known:
                wanted = " or ".join(known)
                got = shown(getattr(self, key))
                raise ConfigError(f"{KEY}.{key}: got {got}, expected {wanted}")
        if (self.serves, self.weights) == ("vllm", "disk"):
            raise ConfigError(
                f"{KEY}.weights: vLLM takes adapters from a folder, and no whole weights; train a "
                "LoRA with weights: lora, or serve with SGLang"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Of a configuration; raises ConfigError naming the full key."""
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                near = nearest(str(key), known)
                hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
                raise ConfigError(f"{KEY}.{key}: unknown key; {hint}")
        for key in ("url", "model", "serves"):
            if given.get(key) is None:
                raise ConfigError(f"{KEY}.{key}: missing; {_HOW[key]}")
        return cls(**given)


_HOW = {
    "url": "the planner is drawn by a server of yours: start one, and say where it listens",
    "model": "what the server calls its model",
    "serves": "vllm or sglang",
}


class Connection:
    """To one server. Raises ConfigError, naming the key, for options that it cannot have."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = Options.of(options)
        self.root = network.checked_url(self.options.url, f"{KEY}.url").removesuffix("/v1")
        try:
            self.patience: Patience = as_patience(self.options.patience)
        except ConfigError as error:
            raise ConfigError(f"{KEY}.{error}") from None
        self._secret = network.token(self.options.token_env, f"{KEY}.token_env")
        self._call = Caller(self.patience, self._secret)

    def client(self) -> httpx2.AsyncClient:
        return network.web_client(self.patience.max_bytes, headers=network.bearer(self._secret))

    async def ask(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Any = None
    ) -> bytes:
        """One call, with patience; raises FailedCall."""
        request = {} if body is None else {"json": body}
        return await self._call(
            lambda: network.ask(client, method, f"{self.root}{path}", **request)
        )

    async def models(self, client: httpx2.AsyncClient) -> list[dict[str, Any]]:
        """What it serves: cards with an `id`, and the `root` that it is from."""
        listed = network.parsed(await self.ask(client, "GET", "/v1/models"))
        cards = listed.get("data") if isinstance(listed, dict) else None
        return [card for card in cards or [] if isinstance(card, dict)]

    def require(self) -> None:
        """Raises ConfigError, in a sentence and at once, where nobody listens, or serves another
        model."""
        self._call = Caller(replace(self.patience, retries=0), self._secret)
        try:
            names = asyncio.run(self._names())
        except FailedCall as error:
            start = _START[self.serves]
            raise ConfigError(
                f"{KEY}.url: there is no server at {self.root}: {error}; start {start}"
            ) from error
        # SGLang calls its model by the folder that it had weights from last.
        if self.serves == "vllm" and self.options.model not in names:
            raise ConfigError(
                f"{KEY}.model: got {shown(self.options.model)}, but {self.root} serves "
                f"{', '.join(names) or 'none'}"
            )

    @property
    def serves(self) -> str:
        return self.options.serves

    async def _names(self) -> list[str]:
        async with self.client() as client:
            return [str(card.get("id")) for card in await self.models(client)]


_START = {
    "vllm": "vllm serve MODEL --logprobs-mode processed_logprobs (docs/agent.md)",
    "sglang": "python -m sglang.launch_server --model-path MODEL (docs/agent.md)",
}
