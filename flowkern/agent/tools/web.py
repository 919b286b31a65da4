"""Tools that read the web: a search engine behind its JSON API, and a page.

A planner, or a page that it has read, chooses the address: so before a connection is made the host
is resolved, all of its addresses are looked at, and the connection goes to one of those that were.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import httpx2

from flowkern.agent import network
from flowkern.agent.clients import as_patience
from flowkern.agent.network import Caller, FailedCall
from flowkern.agent.tools.output import ToolFailure
from flowkern.checks import ConfigError, is_integer, shown

__all__ = ["WebPage", "WebSearch"]

PATIENCE = {"timeout_s": 10.0, "deadline_s": 25.0, "retries": 2, "concurrency": 8}
AGENT = "Mozilla/5.0 (compatible; flowkern agent)"


@dataclass(frozen=True)
class Api:
    """What a search engine calls things."""

    url: str | None = None
    method: str = "GET"
    """GET has the query in the address, POST in JSON."""
    query: str = "q"
    """The field of the query."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else is sent."""
    token_header: str | None = None
    """The header that the key is sent in; None: as a bearer token."""
    token_field: str | None = None
    """Or the field."""
    results: str = "results"
    """Where the list is in the answer: keys, with dots between them."""
    title: str = "title"
    link: str = "link"
    text: str = "text"
    """What an entry calls these."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name == "method":
                wanted, good = "GET or POST", value in ("GET", "POST")
            elif each.name == "fields":
                wanted, good = "a mapping", isinstance(value, Mapping)
            else:
                wanted = "a string"
                good = isinstance(value, str) or (value is None and each.default is None)
            if not good:
                raise ConfigError(f"api.{each.name}: got {shown(value)}, expected {wanted}")


SERVICES = {
    "google": Api(
        url="https://www.googleapis.com/customsearch/v1",
        token_field="key",
        results="items",
        text="snippet",
    ),
    "serper": Api(
        url="https://google.serper.dev/search",
        method="POST",
        token_header="X-API-KEY",
        results="organic",
        text="snippet",
    ),
    "brave": Api(
        url="https://api.search.brave.com/res/v1/web/search",
        token_header="X-Subscription-Token",
        results="web.results",
        link="url",
        text="description",
    ),
    "searxng": Api(fields={"format": "json"}, link="url", text="content"),
}
"""searxng's address is one's own."""


class WebSearch:
    """Asks a search engine over HTTP for the best pages: their titles, links and first words.

    service: a key of SERVICES; api: the fields of `Api` that differ from it, or all of them; url:
    of the API, where it is another. fields: what else is sent (Google: {cx: ...}). token_env: the
    environment variable that holds the key. top: so many are given. patience: see
    `network.Patience`.
    """

    name = "web_search"
    in_caller = True

    def __init__(
        self,
        service: str | None = None,
        url: str | None = None,
        token_env: str | None = None,
        fields: Mapping[str, Any] | None = None,
        api: Mapping[str, Any] | None = None,
        top: int = 5,
        patience: Mapping[str, Any] | None = None,
    ) -> None:
        if service is not None and service not in SERVICES:
            known = ", ".join(SERVICES)
            raise ConfigError(f"service: got {shown(service)}, expected one of {known}")
        if not is_integer(top) or not 1 <= top <= 100:
            raise ConfigError(f"top: got {shown(top)}, expected a whole number from 1 to 100")
        start = SERVICES[service] if service else Api()
        known = [each.name for each in dataclasses.fields(Api)]
        for key in api or {}:
            if key not in known:
                raise ConfigError(f"api: has {shown(key)}; known are {', '.join(known)}")
        self._api = dataclasses.replace(start, **(api or {}))
        self._fields = {**self._api.fields, **(fields or {})}
        self._top = top
        self._url = network.checked_url(url or self._api.url, "url")
        self._token = network.token(token_env, "token_env")
        self._call = Caller(as_patience({**PATIENCE, **(patience or {})}), self._token)

    async def __call__(self, query: str) -> str:
        """Searches the web, and gives titles, addresses and first words of the best pages.

        Args:
            query: What to search for, as one would type it into a search engine.
        """
        try:
            answer = await self._call(lambda: self._attempt(query))
        except FailedCall as error:
            raise ToolFailure(f"the search engine: {error}") from error
        found = answer
        for key in self._api.results.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, list) or not found:
            raise ToolFailure(f"nothing was found for {query[:100]!r}")
        return "\n\n".join(self._entry(row) for row in found[: self._top])

    async def _attempt(self, query: str) -> Any:
        api, headers = self._api, {}
        sent = {**self._fields, api.query: query}
        if self._token is not None and api.token_field:
            sent[api.token_field] = self._token
        elif self._token is not None and api.token_header:
            headers[api.token_header] = self._token
        else:
            headers = network.bearer(self._token)
        request = {"json": sent} if api.method == "POST" else {"params": sent}
        async with network.web_client(self._call.patience.max_bytes, headers=headers) as client:
            return network.parsed(await network.ask(client, api.method, self._url, **request))

    def _entry(self, row: Any) -> str:
        keys = (self._api.title, self._api.link, self._api.text)
        values = (row.get(key) if isinstance(row, dict) else None for key in keys)
        return "\n".join(" ".join(str(value).split()) for value in values if value)


class WebPage:
    """Reads a page as text. length: so many characters at a time; allow_private: also of this
    machine and its network. patience: see `network.Patience`; pages of another type than text, and
    longer ones than its max_bytes, are refused.
    """

    name = "web_page"
    in_caller = True

    def __init__(
        self,
        length: int = 5_000,
        allow_private: bool = False,
        patience: Mapping[str, Any] | None = None,
    ) -> None:
        if not is_integer(length) or not 100 <= length <= 10**6:
            raise ConfigError(f"length: got {shown(length)}, expected from 100 to 1000000")
        if not isinstance(allow_private, bool):
            raise ConfigError(f"allow_private: got {shown(allow_private)}, expected true or false")
        self._length, self._allow_private = length, allow_private
        self._call = Caller(as_patience({**PATIENCE, **(patience or {})}))

    async def __call__(self, url: str, start: int = 0) -> str:
        """Reads a page of the web as text, a part at a time.

        Args:
            url: The address of the page, with its https://.
            start: The character of the text to begin with; 0: its beginning.
        """
        try:
            text = await self._call(lambda: self._attempt(url.strip()))
        except FailedCall as error:
            raise ToolFailure(f"{url[:200]}: {error}") from error
        start = max(0, start)
        part = text[start : start + self._length]
        if not part:
            raise ToolFailure(f"the page has {len(text)} characters of text, none from {start} on")
        end = start + len(part)
        more = f"\n[{len(text)} characters in all; go on with start={end}]"
        return part if end == len(text) else part + more

    async def _attempt(self, url: str) -> str:
        # A client of its own for each: cookies of one question are not seen by another.
        transport = Guarded(self._allow_private)
        client = network.web_client(
            self._call.patience.max_bytes,
            transport=transport,
            headers={"user-agent": AGENT, "accept": "text/html,text/plain;q=0.9,*/*;q=0.1"},
            follow_redirects=True,
            max_redirects=5,
        )
        try:
            async with client, client.stream("GET", url) as response:
                if not response.is_success:
                    raise network.refusal(response.status_code, response.headers)
                kind = response.headers.get("content-type", "text/plain").partition(";")[0].strip()
                if kind.lower() not in TEXTS:
                    raise FailedCall(f"is {network.line(kind, 60)}, and no text")
                await response.aread()
                return page_text(response.text) if "html" in kind.lower() else response.text
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
            raise network.why(error) from error
        except (ValueError, LookupError) as error:  # an address or an encoding that is none
            raise FailedCall(f"{type(error).__name__}: {error}") from error


TEXTS = frozenset(
    {
        "text/html",
        "application/xhtml+xml",
        "text/plain",
        "text/markdown",
        "text/csv",
        "text/xml",
        "application/xml",
        "application/json",
    }
)


class Guarded(httpx2.AsyncBaseTransport):
    """Connects to addresses that it has looked at: of every request, and so of every redirect."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._inner = network.transport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.scheme not in ("http", "https"):
            raise FailedCall(f"the address is of {request.url.scheme or 'no scheme'}, not https")
        failure: httpx2.ConnectError | None = None
        for address in await self._addresses(request.url):
            try:
                return await self._inner.handle_async_request(_to(address, request))
            except httpx2.ConnectError as error:
                failure = error
        raise failure or FailedCall("the host has no address")

    async def _addresses(self, url: httpx2.URL) -> list[str]:
        host = url.raw_host.decode("ascii").strip("[]")
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
        except (OSError, UnicodeError) as error:
            raise FailedCall(f"there is no host {network.line(host, 100)}") from error
        addresses = list(dict.fromkeys(str(row[4][0]) for row in found))
        private = [a for a in addresses if not is_public(a)]
        if private and not self._allow_private:
            raise FailedCall(f"{network.line(host, 100)} is not of the public web ({private[0]})")
        return addresses

    async def aclose(self) -> None:
        await self._inner.aclose()


def _to(address: str, request: httpx2.Request) -> httpx2.Request:
    """The same request to one address of its host, whose name the certificate still has to bear."""
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": request.url.host},
    )


def is_public(address: str) -> bool:
    """Can all of the internet reach it? Addresses that carry another within them are as that is."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # of a scope, fe80::1%eth0
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def page_text(html: str) -> str:
    """The words of a page, a line for each of its blocks."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    lines = (" ".join(line.split()) for line in "".join(reader.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Reader(HTMLParser):
    UNSEEN = frozenset({"script", "style", "noscript", "template", "svg", "head"})
    BLOCKS = frozenset(
        "p div br li tr h1 h2 h3 h4 h5 h6 section article table ul ol dl dt dd pre".split()
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in self.UNSEEN:
            self._unseen += 1
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.UNSEEN:
            self._unseen = max(0, self._unseen - 1)
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.parts.append(data.replace("\n", " "))
