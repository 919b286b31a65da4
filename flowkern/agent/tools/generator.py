"""The base generator: a question to a language model, without any other tool."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol

from flowkern.agent.tools.output import ToolFailure

__all__ = ["Generator"]


class Client(Protocol):
    """What answers messages; `flowkern.agent.clients.TextClient` is one."""

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> Awaitable[str]: ...


class Generator:
    """Asks a language model. client: any text client, the one of the agent's modules by default."""

    name = "generator"
    in_caller = True
    """The client's connections belong to the caller's event loop."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def __call__(self, query: str) -> str:
        """Answers a question or carries out an instruction from general knowledge, step by step.

        Args:
            query: The question or instruction, with all that is needed to answer it.
        """
        answer = await self.client([{"role": "user", "content": query}])
        if not answer.strip():
            raise ToolFailure("the model gave no text")
        return answer
