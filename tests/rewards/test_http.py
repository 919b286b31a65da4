"""The transport of rewards over HTTP: what is tried again, and that every call ends in its time."""

import asyncio
import random
import time

import pytest
from misbehaving import answer, misbehaving, reset

from flowkern.checks import ConfigError
from flowkern.rewards import RewardError, Unscored
from flowkern.rewards.http import Http

httpx = pytest.importorskip("httpx2")


class Time:
    """A clock that moves when somebody waits."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def clock(self):
        return self.now

    async def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


def scripted(*answers, **options):
    """A server that gives these answers, a response or an exception each; the requests it saw; and
    its time."""
    left, seen, watch = list(answers), [], Time()

    def handle(request):
        seen.append(request)
        one = left.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    transport = httpx.MockTransport(handle)
    server = Http("http://host:1", transport=transport, clock=watch.clock, sleep=watch.sleep)
    return Http(**{**vars(server), **options}), seen, watch


def test_what_may_pass_is_tried_again_with_the_same_key():
    failures = [
        httpx.Response(503),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.Response(408),
    ]
    state = random.getstate()
    server, seen, watch = scripted(*failures, httpx.Response(200, json={"a": 1}))
    assert server.post("/x", json={"b": 2}).json() == {"a": 1}
    assert random.getstate() == state, "a training draws the same however often a server is asked"
    assert len({request.headers["idempotency-key"] for request in seen}) == 1
    assert len({request.content for request in seen}) == 1
    assert len(watch.waits) == 4
    assert all(0 <= wait <= 0.5 * 2**k for k, wait in enumerate(watch.waits))
    server, other, _ = scripted(httpx.Response(200))
    server.post("/x", content=b"")
    assert other[0].headers["idempotency-key"] != seen[0].headers["idempotency-key"]


def test_waits_grow_to_ten_seconds_with_full_jitter():
    server, _, watch = scripted(*[httpx.Response(500)] * 1100, retries=1099, timeout=1e9)
    with pytest.raises(Unscored, match="answered 500; tried 1100 times"):
        server.get("/x")
    late = watch.waits[8:]
    assert max(watch.waits) <= 10 and max(late) > 8 and min(late) < 2
    assert 4 < sum(late) / len(late) < 6  # of a uniform number from 0 to 10: 5 +- .2


def test_a_server_says_when_to_come_back():
    busy = httpx.Response(429, headers={"retry-after": "7"})
    server, _, watch = scripted(busy, httpx.Response(200))
    server.post("/x")
    assert watch.waits == [7]
    # After its time there is no sense in waiting for it.
    server, seen, watch = scripted(httpx.Response(503, headers={"retry-after": "70"}))
    with pytest.raises(Unscored, match=r"^http://host:1/x: answered 503$"):
        server.post("/x")
    assert len(seen) == 1 and not watch.waits


@pytest.mark.parametrize("status", [302, 400, 401, 404, 409, 413, 415, 422])
def test_a_refusal_is_final_and_bounded(status):
    said = httpx.Response(status, text="no, secret-1:\n" + "x" * 9000)
    server, seen, _ = scripted(said, secret="secret-1")
    with pytest.raises(RewardError, match=rf"^http://host:1/x: answered {status}: no, ") as found:
        server.post("/x")
    message = str(found.value)
    assert not isinstance(found.value, Unscored) and len(seen) == 1
    assert len(message) < 300 and "\n" not in message and "secret-1" not in message
    assert seen[0].headers["authorization"] == "Bearer secret-1"


def hang(connection, is_over):
    is_over.wait(120)


def reset_in_the_body(connection, is_over):
    connection.sendall(answer(b'{"scores": [1', length=1000))
    reset(connection)


def drops(data):
    def behave(connection, is_over):
        for i in range(len(data)):
            connection.sendall(data[i : i + 1])
            if is_over.wait(0.1):
                return

    return behave


def fine(connection, is_over):
    connection.sendall(answer(b'{"a": 1}'))


def quickly(url, **options):
    async def at_once(_):
        pass

    return Http(url, sleep=at_once, **options)


def test_a_connection_that_breaks_is_tried_again():
    with misbehaving(lambda c, _: reset(c), reset_in_the_body, fine) as (url, requests):
        assert quickly(url).post("/x", content=b"body").json() == {"a": 1}
    assert [body for _, body in requests] == [b"body"] * 3
    assert len({head for head, _ in requests}) == 1
    with misbehaving(reset_in_the_body) as (url, _):
        with pytest.raises(Unscored, match=r"/x: the connection broke: .*tried 3 times"):
            quickly(url, retries=2).post("/x")


@pytest.mark.parametrize(
    "behave",
    [hang, drops(answer(b"x" * 1000)), drops(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000)],
    ids=["nothing", "a body by drops", "a head by drops"],
)
def test_a_call_ends_in_its_time(behave):
    with misbehaving(behave) as (url, _):
        begin = time.monotonic()
        with pytest.raises(Unscored, match="/x: no answer within 0.3 s"):
            Http(url, timeout=0.3).post("/x", content=b"body")
        assert time.monotonic() - begin < 30, "it waits for a server that takes 100 s"


def test_a_server_that_reads_nothing_ends_in_time(monkeypatch):
    monkeypatch.setattr("misbehaving.read_request", lambda connection: None)
    with misbehaving(hang) as (url, _):
        with pytest.raises(Unscored, match="no answer within 0.3 s"):
            Http(url, timeout=0.3).post("/x", content=bytes(2**25))


def test_a_long_answer_is_not_read_to_its_end():
    sent = []

    def ten_megabytes(connection, is_over):
        connection.sendall(answer(b"", length=10**7))
        for _ in range(100):
            connection.sendall(b"a" * 10**5)
            sent.append(10**5)

    with misbehaving(ten_megabytes) as (url, _):
        with pytest.raises(Unscored, match="/x: the answer is longer than 50000 bytes"):
            Http(url, max_bytes=50_000).post("/x")
    assert sum(sent) < 10**7
    packed = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b""))
    server, _, _ = scripted(packed)
    with pytest.raises(Unscored, match="packed"):
        server.post("/x")


def test_what_is_no_json_has_no_score():
    server, _, _ = scripted(httpx.Response(200, text="<html>log in</html>"))
    with pytest.raises(Unscored, match=r"/x: the answer is not JSON: '<html>log in</html>'"):
        server.post("/x").json()


def test_where_nobody_listens():
    with misbehaving(fine) as (url, _):
        pass
    with pytest.raises(Unscored, match=r"/x: cannot connect: .*tried 2 times"):
        quickly(url, retries=1).get("/x")


def test_no_proxy_of_the_environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with misbehaving(fine) as (url, _):
        assert Http(url).get("/x").status == 200


def test_inside_of_a_running_loop():
    async def notebook():
        server, _, _ = scripted(httpx.Response(200, json=1))
        return server.get("/x").json()

    assert asyncio.run(notebook()) == 1


@pytest.mark.parametrize("url", ["judge:8000", "ftp://judge", "http://", None, "http://a:b"])
def test_an_address_that_is_none(url):
    with pytest.raises(ConfigError, match=r"^url: got .*, expected http://HOST:PORT"):
        Http(url)
    with pytest.raises(ConfigError, match="give it by token_env"):
        Http("http://me:secret@judge")
