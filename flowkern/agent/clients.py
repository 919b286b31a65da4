"""A client of any server that speaks OpenAI's chat completions: messages in, a text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowkern.agent import network
from flowkern.agent.network import Caller, FailedCall, Patience
from flowkern.checks import ConfigError, finite_number
from flowkern.extras import wanting

__all__ = ["FailedCall", "Patience", "TextClient"]

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": ...}"""


class TextClient:
    """A language model behind an OpenAI-compatible server: vLLM, SGLang, a vendor's.

    base_url: as OpenAI's clients take it, with its /v1; token_env: the name of the environment
    variable that holds the token, None for a server that asks for none. Temperature and top_p are
    sent with every request, as a server's own defaults are not the same everywhere (a released
    agent trained at a temperature other than the configured one, which its client had dropped).

    Raises ConfigError for an address that is none, a variable that is not set, and where openai is
    not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        token_env: str | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 2048,
        patience: Patience | Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise wanting("a text client", "openai") from error
        try:
            for key, value in (("temperature", temperature), ("top_p", top_p)):
                finite_number(key, value, "a number of at least 0", lambda v: v >= 0)
            finite_number("max_tokens", max_tokens, "a whole number above 0", lambda v: v > 0)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.base_url = network.checked_url(base_url, "base_url")
        self.model = model
        self.defaults = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        secret = network.token(token_env, "token_env")
        self._call = Caller(as_patience(patience), secret)
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=secret or "none",
            max_retries=0,  # tried again here, within one deadline
            timeout=None,
            http_client=network.web_client(self._call.patience.max_bytes),
        )

    async def __call__(
        self,
        messages: Sequence[Message] | str,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> str:
        """The text of the answer; a string is one message of the user.

        Raises FailedCall, whose text is one line: a server that is down, slow, or answers what is
        no text; and nothing else.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        settings = {**self.defaults, **{k: v for k, v in given.items() if v is not None}}
        settings["max_completion_tokens"] = settings.pop("max_tokens")
        if seed is not None:
            settings["seed"] = seed
        try:
            return await self._call(lambda: self._attempt(list(messages), settings))
        except FailedCall as error:
            raise FailedCall(f"{self.model} at {self.base_url}: {error}") from error

    async def _attempt(self, messages: list[Message], settings: Mapping[str, Any]) -> str:
        try:
            answer = await self._client.chat.completions.create(
                model=self.model, messages=messages, **settings
            )
        except self._openai.APIStatusError as error:
            raise network.refusal(
                error.status_code, error.response.headers, error.response.text
            ) from error
        except self._openai.APIConnectionError as error:
            raise network.why(error.__cause__ or error) from error
        except (self._openai.OpenAIError, ValueError, RecursionError) as error:
            raise FailedCall(f"the answer is none: {error}") from error
        return _text(answer)


def _text(answer: Any) -> str:
    """The first choice's; a server may have answered anything."""
    try:
        text = answer.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise FailedCall("the answer has no text")
    return text


def as_patience(given: Patience | Mapping[str, Any] | None) -> Patience:
    """Of a configuration's mapping too."""
    if isinstance(given, Patience):
        return given
    try:
        return Patience(**(given or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"patience.{error}") from error
