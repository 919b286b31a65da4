"""The text client against a server that misbehaves: a reason of one line, or the text."""

import asyncio

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install 'flowkern[agent]'")

import servers

from flowkern.agent.clients import FailedCall, Patience, TextClient
from flowkern.checks import ConfigError

QUICK = Patience(timeout_s=0.3, deadline_s=2, retries=2, backoff_s=0, max_bytes=100_000)


def chat(request):
    said = request.json["messages"][-1]["content"]
    message = {"role": "assistant", "content": f"{said}!"}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": request.json["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


@pytest.fixture
def server():
    with servers.Server({"/v1/chat/completions": chat}) as server:
        yield server


def client(server, **options):
    options.setdefault("patience", QUICK)
    return TextClient(f"{server.url}/v1/", "tiny", **options)


def test_text_and_what_is_sent(server, monkeypatch):
    monkeypatch.setenv("SECRET", "sesame")
    speak = client(server, token_env="SECRET", temperature=0.25, top_p=0.5, max_tokens=7)
    # a loop of its own for each, as for each rollout
    assert asyncio.run(speak("hello")) == "hello!"
    messages = [{"role": "system", "content": "a {b}"}, {"role": "user", "content": "{{ c }} %s"}]
    assert asyncio.run(speak(messages, temperature=0.0, seed=3)) == "{{ c }} %s!"
    first, second = (request.json for request in server.requests)
    assert (first["temperature"], first["top_p"]) == (0.25, 0.5)
    assert first["max_completion_tokens"] == 7 and "seed" not in first
    assert (second["temperature"], second["top_p"], second["seed"]) == (0.0, 0.5, 3)
    assert second["messages"] == messages
    assert server.requests[0].headers["authorization"] == "Bearer sesame"


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([servers.BUSY], 2),
        ([servers.BROKEN, servers.BUSY], 3),
        ([servers.DROPPED], 2),
        ([servers.HUNG_UP], 2),
        ([servers.BY_DROPS], 2),
    ],
    ids=["429", "500 then 429", "dropped", "hung up", "by drops"],
)
def test_tries_again(server, faults, requests):
    server.faults.extend(faults)
    assert asyncio.run(client(server)("hello")) == "hello!"
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (servers.BUSY, "answered 429: too many; tried 3 times", 3),
        (servers.BROKEN, "answered 500: Internal Server Error; tried 3 times", 3),
        (servers.DROPPED, "the connection broke: .*; tried 3 times", 3),
        (servers.HUNG_UP, "the connection broke: .*; tried 3 times", 3),
        (servers.BY_DROPS, "no answer within 0.3 s; tried 3 times", 3),
        (servers.FLOOD, "the answer is longer than 100000 bytes", 1),
        (servers.NOT_JSON, "the answer (is none|has no text).*", 1),
        (servers.Fault(servers.Answer(b"who are\nyou?", 401)), "answered 401: who are you\\?", 1),
        (servers.Fault(servers.Answer(b"{}")), "the answer has no text", 1),
        (servers.Fault(servers.Answer(b"[" * 90_000)), "the answer .*", 1),
        (
            servers.Fault(servers.Answer(b'{"choices": [{"message": {"content": null}}]}')),
            "the answer has no text",
            1,
        ),
        (
            servers.Fault(servers.Answer(b"x", headers={"content-encoding": "gzip"})),
            "the answer is packed \\(gzip\\), which was not asked for",
            1,
        ),
    ],
)
def test_one_line_of_why(server, fault, reason, requests):
    if fault.answer and fault.answer.body[:1] in b"[{":
        fault.answer.headers["content-type"] = "application/json"
    server.faults.extend([fault] * 3)
    with pytest.raises(FailedCall, match=f"^tiny at {server.url}/v1: {reason}$") as caught:
        asyncio.run(client(server)("hello"))
    assert "\n" not in str(caught.value)
    assert len(server.requests) == requests


def test_a_token_that_is_said_back_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("SECRET", "sesame")
    server.faults.append(servers.Fault(servers.Answer(b"no such key: sesame", 401)))
    with pytest.raises(FailedCall, match=r"answered 401: no such key: \(the token\)$"):
        asyncio.run(client(server, token_env="SECRET")("hello"))


def test_a_wait_beyond_the_deadline_is_not_waited(server):
    server.faults.append(servers.Fault(servers.Answer(b"", 429, {"retry-after": "3600"})))
    with pytest.raises(FailedCall, match="answered 429$"):
        asyncio.run(client(server)("hello"))


def test_nobody_there(server):
    with servers.Server({}) as gone:
        speak = client(gone)
    with pytest.raises(FailedCall, match="cannot connect: .*; tried 3 times"):
        asyncio.run(speak("hello"))


def test_so_many_at_a_time(server):
    speak = client(server, patience={"concurrency": 3, "backoff_s": 0})

    async def many():
        return await asyncio.gather(*(speak(str(i)) for i in range(20)))

    assert asyncio.run(many()) == [f"{i}!" for i in range(20)]
    assert server.most_busy <= 3


def test_cancelled_is_not_a_failure(server):
    """A rollout that ends takes its calls with it: no reason, no further attempt."""
    server.faults.extend([servers.BY_DROPS] * 3)

    async def leave():
        async with asyncio.timeout(0.05):
            await client(server)("hello")

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_env": "NOT_SET"}, "token_env: the environment variable NOT_SET is not set"),
        ({"base_url": "localhost:1"}, "base_url: got 'localhost:1', expected http://"),
        ({"base_url": 3}, "base_url: got 3, expected http://"),
        ({"base_url": "http://me:secret@host"}, "base_url: has a name or password in it"),
        ({"patience": {"timeout_s": 0}}, "patience.timeout_s: got 0, expected a number above 0"),
        ({"patience": {"tries": 1}}, "patience.*'tries'"),
    ],
)
def test_refused(server, options, message):
    options = {"base_url": server.url, "model": "tiny", **options}
    with pytest.raises(ConfigError, match=message):
        TextClient(**options)
