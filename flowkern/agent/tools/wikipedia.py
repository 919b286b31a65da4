"""Wikipedia, through MediaWiki's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowkern.agent import network
from flowkern.agent.clients import as_patience
from flowkern.agent.network import Caller, FailedCall
from flowkern.agent.tools.output import ToolFailure
from flowkern.agent.tools.web import PATIENCE
from flowkern.checks import ConfigError, is_integer, shown

__all__ = ["Wikipedia"]


class Wikipedia:
    """Finds articles, and gives the beginning of each.

    language: of the edition, as in its address (en.wikipedia.org); url: of another wiki's api.php.
    top: so many articles; length: so many characters of each. user_agent: Wikimedia asks for one
    that says whom to write to. patience: see `network.Patience`.
    """

    name = "wikipedia"
    in_caller = True

    def __init__(
        self,
        language: str = "en",
        url: str | None = None,
        top: int = 3,
        length: int = 2_000,
        user_agent: str = "flowkern-agent (python-httpx2)",
        patience: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(language, str) or not language.replace("-", "").isalnum():
            raise ConfigError(f"language: got {shown(language)}, expected one such as en")
        for key, value, most in (("top", top, 20), ("length", length, 100_000)):
            if not is_integer(value) or not 1 <= value <= most:
                got = shown(value)
                raise ConfigError(f"{key}: got {got}, expected a whole number from 1 to {most}")
        self._url = network.checked_url(url or f"https://{language}.wikipedia.org/w/api.php", "url")
        self._top, self._length, self._agent = top, length, user_agent
        self._call = Caller(as_patience({**PATIENCE, **(patience or {})}))

    async def __call__(self, query: str) -> str:
        """Searches Wikipedia, and gives the beginnings of the articles that fit best.

        Args:
            query: A name, or a few words that the article has.
        """
        try:
            answer = await self._call(lambda: self._attempt(query))
        except FailedCall as error:
            raise ToolFailure(f"Wikipedia: {error}") from error
        if not isinstance(answer, dict):
            raise ToolFailure("Wikipedia gave no answer")
        if "error" in answer:
            raise ToolFailure(f"Wikipedia: {_at(answer['error'], 'info')}")
        pages = _at(_at(answer, "query"), "pages")
        found = [page for page in pages or [] if _at(page, "extract")]
        if not found:
            raise ToolFailure(f"Wikipedia has no article on {query[:100]!r}")
        found.sort(key=lambda page: page.get("index", 0))
        return "\n\n".join(self._article(page) for page in found)

    async def _attempt(self, query: str) -> Any:
        asked = {
            "action": "query",
            "format": "json",
            "formatversion": 2,
            "generator": "search",
            "gsrsearch": query[:300],  # the longest that the API takes
            "gsrlimit": self._top,
            "prop": "extracts",
            "exintro": 1,
            "explaintext": 1,
            "exlimit": self._top,
        }
        headers = {"user-agent": self._agent}
        async with network.web_client(self._call.patience.max_bytes, headers=headers) as client:
            return network.parsed(await network.ask(client, "GET", self._url, params=asked))

    def _article(self, page: Mapping[str, Any]) -> str:
        text = str(page["extract"])
        cut = text if len(text) <= self._length else f"{text[: self._length]}..."
        return f"{page.get('title', '')}: {cut}"


def _at(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None
