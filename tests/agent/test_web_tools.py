"""The tools that read the web, against a local stand-in; and that no page leads a planner to this
machine or its network."""

import asyncio
import json
import socket
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("httpx2", reason="httpx2 is not installed: pip install 'flowkern[agent]'")
import httpx2
import servers

from flowkern.agent import network
from flowkern.agent.tools import load_tool
from flowkern.agent.tools.web import SERVICES, Api, is_public, page_text
from flowkern.checks import ConfigError

QUICK = {"timeout_s": 0.4, "deadline_s": 2, "retries": 1, "backoff_s": 0, "max_bytes": 100_000}
HTML = """<html><head><title>no</title><style>p {}</style></head><body><h1>Fish</h1>
<script>alert("no")</script><p>Cod &amp; <b>chips</b>
 are {{ nice }} %s {0}.</p><ul><li>one<li>two</ul></body></html>"""
ROW = {"title": "Cod", "link": "https://c/", "url": "https://c/", "snippet": "A  fish."}
ROW |= {"description": "A fish.", "content": "A fish.", "text": "A fish."}


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def fields(request):
    return {k: v[0] for k, v in parse_qs(urlsplit(request.target).query).items()}


def searched(request):
    """Any of the services, by its own name for things."""
    found = json.loads(request.body) if request.body else fields(request)
    service = SERVICES.get(request.headers.get("service", ""), Api())
    return nested(service.results, [ROW, {**ROW, "title": found["q"]}, ROW])


def article(request):
    asked = fields(request)
    if asked["gsrsearch"] == "nothing":
        return {"batchcomplete": True}
    if asked["gsrsearch"] == "wrong":
        return {"error": {"code": "x", "info": "a parameter\nis wrong"}}
    pages = [
        {"index": 2, "title": "Haddock", "extract": "Another fish."},
        {"index": 1, "title": "Cod", "extract": "A fish of the sea."},
        {"index": 3, "title": "Empty", "extract": ""},
    ]
    return {"query": {"pages": pages}}


def page(body, kind="text/html; charset=utf-8", **more):
    return lambda _: servers.Answer(body.encode(), headers={"content-type": kind, **more})


ROUTES = {
    "/search": searched,
    "/w/api.php": article,
    "/page": page(HTML),
    "/plain": page("word " * 500, "text/plain"),
    "/picture": page("PNG", "image/png"),
    "/encoding": page("x", "text/plain; charset=unheard-of"),
    "/moved": lambda _: servers.Answer(status=302, headers={"location": "/page"}),
    "/loop": lambda _: servers.Answer(status=302, headers={"location": "/loop"}),
    "/file": lambda _: servers.Answer(status=302, headers={"location": "file:///etc/passwd"}),
}


@pytest.fixture
def server():
    with servers.Server(ROUTES) as server:
        yield server


def call(tool, **arguments):
    return asyncio.run(tool(**arguments))


@pytest.mark.parametrize("service", [None, *SERVICES])
def test_search(server, monkeypatch, service):
    monkeypatch.setenv("SECRET", "sesame")
    options = {"service": service, "url": f"{server.url}/search", "token_env": "SECRET", "top": 2}
    monkeypatch.setitem(
        server.routes,
        "/search",
        lambda request: searched(
            servers.Request("", request.target, {"service": service or ""}, request.body)
        ),
    )
    tool = load_tool("web_search", patience=QUICK, **options)
    result = call(tool, query="{{ fish }} %s & more")
    assert result.failure is None
    assert result.text == "Cod\nhttps://c/\nA fish.\n\n{{ fish }} %s & more\nhttps://c/\nA fish."
    (request,) = server.requests
    known = SERVICES.get(service or "", Api())
    if known.token_field:
        assert fields(request)[known.token_field] == "sesame"
    else:
        header = known.token_header or "authorization"
        assert request.headers[header.lower()].endswith("sesame")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (servers.BUSY, "answered 429: too many; tried 2 times"),
        (servers.BROKEN, "answered 500: Internal Server Error; tried 2 times"),
        (servers.DROPPED, "the connection broke: "),
        (servers.BY_DROPS, "no answer within 0.4 s; tried 2 times"),
        (servers.FLOOD, "the answer is longer than 100000 bytes"),
        (servers.NOT_JSON, "the answer is not JSON"),
        (servers.Fault(servers.Answer(b"[]")), "nothing was found|no answer"),
        (servers.Fault(servers.Answer(b'{"results": {"a": 1}}')), "nothing|no article"),
    ],
    ids=["429", "500", "dropped", "by drops", "ten megabytes", "html", "a list", "other keys"],
)
@pytest.mark.parametrize("name", ["web_search", "wikipedia"])
def test_a_service_that_fails(server, name, fault, reason):
    path = "/search" if name == "web_search" else "/w/api.php"
    tool = load_tool(name, patience=QUICK, url=f"{server.url}{path}")
    server.faults.extend([fault, fault])
    result = call(tool, query="cod")
    server.faults.clear()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(result.failure)
    assert "\n" not in result.failure and result.text.endswith(result.failure)
    assert call(tool, query="cod").failure is None  # and it works again


def test_wikipedia(server):
    tool = load_tool("wikipedia", url=f"{server.url}/w/api.php", length=9, patience=QUICK)
    assert call(tool, query="cod").text == "Cod: A fish of...\n\nHaddock: Another f..."
    assert "flowkern" in server.requests[0].headers["user-agent"]
    assert call(tool, query="nothing").failure == "Wikipedia has no article on 'nothing'"
    assert call(tool, query="wrong").failure == "Wikipedia: a parameter is wrong"
    assert load_tool("wikipedia", language="de").name == "wikipedia"


def test_page(server):
    tool = load_tool("web_page", allow_private=True, patience=QUICK, length=1_000)
    wanted = "Fish\n\nCod & chips are {{ nice }} %s {0}.\n\none\ntwo"
    assert call(tool, url=f"{server.url}/page").text == wanted == page_text(HTML)
    assert call(tool, url=f"{server.url}/moved").text == wanted
    first = call(tool, url=f"{server.url}/plain").text
    assert first.endswith("[2500 characters in all; go on with start=1000]")
    rest = call(tool, url=f"{server.url}/plain", start=2_000).text
    assert rest == ("word " * 100)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/picture", "is image/png, and no text"),
        ("/nowhere", "answered 404"),
        ("/loop", "TooManyRedirects"),
        ("/file", "the address is of file, not https|UnsupportedProtocol"),
    ],
)
def test_page_that_is_none(server, path, reason):
    tool = load_tool("web_page", allow_private=True, patience=QUICK)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(call(tool, url=server.url + path).failure)
    server.faults.extend([servers.FLOOD])
    assert "longer than 100000 bytes" in call(tool, url=f"{server.url}/page").failure


@pytest.mark.parametrize(
    "url",
    [
        "",
        "page",
        "file:///etc/passwd",
        "ftp://a/",
        "https://",
        "http://a:b:c/",
        "http://[",
        "x" * 999,
    ],
)
def test_address_that_is_none(url):
    result = call(load_tool("web_page", patience={**QUICK, "retries": 0}), url=url)
    assert result.failure and "\n" not in result.failure and len(result.failure) < 600


def test_no_private_address(server):
    """However it is written; and nothing is asked of it."""
    tool = load_tool("web_page", patience=QUICK)
    port = server.port
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]"):
        reason = call(tool, url=f"http://{host}:{port}/page").failure
        assert "is not of the public web" in reason or "there is no host" in reason
    assert not server.requests


PRIVATE = (
    "127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 "
    "255.255.255.255 240.0.0.1 ::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 "
    "::ffff:169.254.169.254 64:ff9b::7f00:1 2002:7f00:1:: 2001:db8::1"
)


def test_which_addresses_are_public():
    assert not [address for address in PRIVATE.split() if is_public(address)]
    assert all(map(is_public, ["93.184.216.34", "2606:4700::1111", "64:ff9b::5db8:d822"]))


@pytest.fixture
def internet(monkeypatch):
    """Names with their addresses, in turn; what is asked of which address; and what it answers."""

    found = SimpleNamespace(names={}, asked=[], answers={})

    async def getaddrinfo(_, host, port, **__):
        addresses = found.names[host].pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    def answer(request):
        host = request.url.host
        found.asked.append((host, request.headers["host"], request.extensions["sni_hostname"]))
        said = found.answers[host]
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(network, "transport", lambda: httpx2.MockTransport(answer))
    return found


PUBLIC = "93.184.216.34"


def test_the_address_that_was_looked_at_is_the_one_connected_to(internet):
    """A name that means another address the next time is not asked again."""
    internet.names["fish.example"] = [[PUBLIC], ["127.0.0.1"]]
    internet.answers[PUBLIC] = httpx2.Response(200, text="cod")
    tool = load_tool("web_page", patience=QUICK)
    assert call(tool, url="https://fish.example/a").text == "cod"
    assert internet.asked == [(PUBLIC, "fish.example", "fish.example")]
    assert "not of the public web (127.0.0.1)" in call(tool, url="https://fish.example/a").failure
    assert len(internet.asked) == 1


def test_redirects_are_looked_at_again(internet):
    internet.names |= {"fish.example": [[PUBLIC]], "inner.example": [["10.0.0.7"]]}
    internet.answers[PUBLIC] = httpx2.Response(
        302, headers={"location": "http://inner.example:8000/secret"}
    )
    failure = call(load_tool("web_page", patience=QUICK), url="https://fish.example").failure
    assert "inner.example is not of the public web (10.0.0.7)" in failure
    assert [host for host, *_ in internet.asked] == [PUBLIC]


def test_one_private_address_among_public_ones(internet):
    internet.names["fish.example"] = [[PUBLIC, "127.0.0.1"]]
    failure = call(load_tool("web_page", patience=QUICK), url="https://fish.example").failure
    assert "not of the public web (127.0.0.1)" in failure and not internet.asked


def test_another_address_of_a_host_where_the_first_does_not_answer(internet):
    internet.names["fish.example"] = [["2606:4700::1111", PUBLIC]]
    internet.answers["2606:4700::1111"] = httpx2.ConnectError("no route")
    internet.answers[PUBLIC] = httpx2.Response(200, text="cod")
    assert call(load_tool("web_page", patience=QUICK), url="https://fish.example").text == "cod"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("web_search", {}, r"web_search\.url: got None, expected http://"),
        ("web_search", {"service": "bing"}, r"web_search\.service: got 'bing', expected one of"),
        ("web_search", {"api": {"method": "PUT"}}, r"web_search.*api\.method: got 'PUT'"),
        ("web_search", {"api": {"resluts": "a"}}, "web_search.*api: has 'resluts'; known are url"),
        ("web_search", {"srevice": "a"}, "web_search.srevice: unknown key; did you mean"),
        ("web_search", {"service": "brave", "token_env": "NO"}, "token_env: .* NO is not set"),
        ("web_search", {"service": "brave", "top": 0}, r"web_search\.top: got 0"),
        ("web_page", {"length": 1}, r"web_page\.length: got 1"),
        ("web_page", {"allow_private": "no"}, r"web_page\.allow_private: got 'no'"),
        ("web_page", {"patience": {"retries": -1}}, r"web_page.*patience\.retries: got -1"),
        ("wikipedia", {"language": "../x"}, r"wikipedia\.language: got '../x'"),
        ("wikipedia", {"top": 1.5}, r"wikipedia\.top: got 1.5"),
    ],
)
def test_options_refused(monkeypatch, name, options, message):
    monkeypatch.delenv("NO", raising=False)
    with pytest.raises(ConfigError, match=message):
        load_tool(name, **options)
