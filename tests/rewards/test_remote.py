"""Rewards on another machine: what the server takes, and what the client makes of what comes back.

Mostly without a port: the client speaks to the server's application in this process.
"""

import ast
import asyncio
import base64
import functools
import io
import json
import re
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from misbehaving import answer, misbehaving
from safetensors.torch import save
from waiting import wait_for

from flowkern.checks import ConfigError
from flowkern.rewards import RewardError, Unscored
from flowkern.rewards.http import Http
from flowkern.rewards.remote.body import encode
from flowkern.rewards.remote.client import RemoteReward
from flowkern.rewards.remote.protocol import JSON, SAFETENSORS, Fields, Limits
from flowkern.rewards.remote.service import Served, Service
from flowkern.train.config import Rewards
from flowkern.train.fields import build
from flowkern.train.quiet import quiet
from flowkern.train.reward_calls import Call, KeyedReward
from flowkern.train.scoring import load_rewards

httpx = pytest.importorskip("httpx2")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from flowkern.rewards.remote.server import app  # noqa: E402, it needs both

ROOT = Path(__file__).resolve().parents[2]
URL = "http://server:1"


class Redness:
    """Each image by itself, its prompt and its metadata."""

    scales: ClassVar = {"raw": (1.0, 0.0), "half": (0.5, 0.0)}
    default_scale = "half"

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts, metadata):
        self.calls.append(len(images))
        if any(text == "fail" for text in prompts):
            raise RuntimeError("out of paint")
        if "unscored" in prompts:
            raise Unscored("the critic is away")
        red = images.select(-3, 0).flatten(1).double().mean(1) / 3
        plus = [len(p) + one.get("plus", 0) for p, one in zip(prompts, metadata, strict=True)]
        score = red + torch.tensor(plus, dtype=torch.float64)
        score[[i for i, text in enumerate(prompts) if text == "nan"]] = torch.nan
        return score, {"frames": torch.full((len(images),), float(images.shape[1]))}


class Rank:
    """Of an image in its group, which has to be whole."""

    def __call__(self, images, prompts, metadata, *, group):
        bright = images.flatten(1).mean(1)
        group = torch.tensor(group)
        return [float((bright[group == g] < b).sum()) for g, b in zip(group, bright, strict=True)]


class ServedHere:
    """A server of `rewards`, in this process; every request goes through its application."""

    def __init__(self, monkeypatch, rewards, token=None, upload_s=None, **options):
        served = {n: Served(one, n) for n, one in rewards.items()}
        self.service = Service(served, **options)
        self.app = app(self.service, token, upload_s)
        self.token = token
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)

        async def at_once(_):
            pass

        server = functools.partial(Http, transport=transport, sleep=at_once)
        monkeypatch.setattr("flowkern.rewards.asking.Http", server)
        self.http = server(URL, secret=token)

    def post(self, body, kind=SAFETENSORS, **headers):
        """The status, and what the server says."""
        sent = {"content-type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
        if self.token is not None:
            sent.setdefault("authorization", f"Bearer {self.token}")

        async def ask():
            async with httpx.AsyncClient(transport=self.http.transport, timeout=20) as web:
                return await web.post(f"{URL}/v1/score", content=body, headers=sent)

        found = asyncio.run(ask())
        return found.status_code, found.json()


@pytest.fixture
def served(monkeypatch):
    made = []

    def serve(token=None, upload_s=None, rewards=None, **options):
        rewards = rewards or {"redness": Redness(), "rank": Rank()}
        made.append(ServedHere(monkeypatch, rewards, token, upload_s, **options))
        return made[-1]

    yield serve
    for one in made:
        one.service.close()


def images(count, *shape, seed=0):
    """Of 8 bits, as they travel."""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (3, 12, 8)
    return torch.randint(0, 256, (count, *shape), generator=generator).float() / 255


def fields(count, **more):
    given = {"rewards": ["redness"], "prompts": ["a"] * count, "request_id": "r"}
    return Fields(protocol=1, **{**given, **more})


def body_of(count=2, format="raw", **more):
    return encode(fields(count, **more), (images(count) * 255).to(torch.uint8), format)[1]


# ---- what goes well ----


@pytest.mark.parametrize("format", ["raw", "webp"])
def test_the_scores_of_the_reward_itself_to_the_bit(served, format):
    served()
    remote = RemoteReward("redness", url=URL, format=format, batch=3)
    prompts = ["one", "löwe 🦁", 'a "quoted" {brace}', "", "five\n"]
    metadata = [{"plus": i, "more": {"deep": [None, "é"]}} for i in range(5)]
    for pixels in (images(5), images(5, 1, 3, 9, 7)):
        found, info = remote(pixels, prompts, metadata)
        wanted, beside = Redness()(pixels, prompts, metadata)
        assert torch.equal(found, wanted)
        assert torch.equal(info["frames"], beside["frames"].double())
    assert remote.scales == Redness.scales and remote.default_scale == "half"
    assert remote.may_fail and remote.overlaps and not remote.takes_group


def test_frames_of_a_video_and_their_rate(served):
    class Fps:
        def __call__(self, videos, prompts, metadata):
            self.seen = videos
            return [one["fps"] for one in metadata]

    fps = Fps()
    served(rewards={"fps": fps})
    video = images(1, 9, 3, 4, 4)
    scores, _ = RemoteReward("fps", url=URL, frames=5)(video, ["p"], [{"fps": 16.0}])
    assert torch.equal(fps.seen, video[:, [0, 2, 4, 6, 8]]) and scores.tolist() == [8.0]
    RemoteReward("fps", url=URL, frames="all")(video, ["p"], [{"fps": 16.0}])
    assert torch.equal(fps.seen, video)


def test_groups_stay_whole(served):
    served()
    remote = RemoteReward("rank", url=URL, batch=5)
    pixels, group = images(9), [0, 0, 0, 1, 1, 1, 1, 7, 7]
    assert remote.takes_group
    found, _ = remote(pixels, ["p"] * 9, [{}] * 9, group=group)
    assert found.tolist() == Rank()(pixels, [], [], group=group)
    with pytest.raises(RewardError, match="answered 422: group: rank takes it"):
        remote(pixels, ["p"] * 9, [{}] * 9)


def test_files_of_several_sizes_in_one_request(served):
    service = served()
    sizes = [(5, 4), (6, 4), (5, 4)]
    files = [png(np.full((*size, 3), 255, np.uint8)) for size in sizes]
    tree = fields(3).model_dump(exclude_none=True) | {"images": files}
    status, found = service.post(json.dumps(tree), JSON)
    assert status == 200, found
    assert found["rewards"]["redness"] == [1 / 3 + 1] * 3
    assert found["request_id"] == "r" and found["errors"] == []


def test_requests_that_wait_are_merged_and_one_fault_is_not_anothers(served):
    begun, go = threading.Event(), threading.Event()

    class Slow(Redness):
        def __call__(self, images, prompts, metadata):
            begun.set()
            assert go.wait(30)
            return super().__call__(images, prompts, metadata)

    slow = Slow()
    service = served(rewards={"redness": slow}, batch=8)
    texts = ["first", "a", "fail", "b", "unscored", "c"]
    with ThreadPoolExecutor(len(texts)) as pool:
        asked = []
        for i, text in enumerate(texts):
            asked.append(pool.submit(service.post, body_of(2, prompts=[text] * 2)))
            wait_for(begun.is_set)
            wait_for(lambda i=i: service.service._workers["redness"].waiting == i)
        go.set()
        found = [one.result(20) for one in asked]
    assert slow.calls[:2] == [2, 8], "the one alone, then four that fit in one call"
    assert [status for status, _ in found] == [200, 200, 500, 200, 200, 200]
    said = found[2][1]["error"]
    assert said == {"code": "reward_failed", "message": "redness: RuntimeError: out of paint"}
    gone = found[4][1]
    assert gone["rewards"]["redness"] == [None, None]
    assert {e["message"] for e in gone["errors"]} == {"the critic is away"}


class Rude:
    """Writes into what it is given, reports nonsense beside, and may leave as no exception does."""

    def __call__(self, images, prompts, metadata):
        if prompts[0] == "leave":
            raise asyncio.CancelledError
        seen = [float(one["deep"].pop()) for one in metadata]
        if prompts[0] == "few":
            return seen[1:]
        prompts.clear()
        metadata.clear()
        return seen, {"page": 7, "seen": list(seen)}


@pytest.mark.filterwarnings("ignore:(rude|too). info 'page' is not one real number:UserWarning")
def test_a_reward_that_writes_or_leaves_harms_nobody(served):
    service = served(rewards={"rude": Rude(), "too": Rude()})
    rows = [{"deep": [3]}, {"deep": [4]}]
    sent = body_of(2, prompts=["", ""], metadata=rows, rewards=["rude", "too"])
    status, found = service.post(sent)
    assert status == 200 and found["rewards"] == {"rude": [3, 4], "too": [3, 4]}
    assert found["info"]["rude"] == {"seen": [3, 4]}
    for text, said in (
        ("leave", "rude: CancelledError:"),
        ("few", r"rude: ValueError: returned shape (1,); expected 2 numbers, one per image"),
    ):
        sent = body_of(2, prompts=[text] * 2, metadata=rows, rewards=["rude"])
        status, found = service.post(sent)
        assert (status, found["error"]["message"]) == (500, said)


# ---- what the server refuses ----


def png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def forged_png(width, height):
    """A head that says so, a few bytes long."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def other_file(kind, mode="RGB", **options):
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, (4, 4)).save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def blob(tensors, request=None):
    text = json.dumps(fields(2).model_dump(exclude_none=True) if request is None else request)
    return save(tensors, metadata={"request": text})


def with_images(*files, **more):
    count = more.pop("count", len(files))
    tree = fields(count).model_dump(exclude_none=True) | {"images": list(files)}
    return json.dumps(tree | more).encode()


PIXELS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
HALF = {"protocol": 1, "request_id": "r", "rewards": ["redness"], "prompts": ["a", "\ud800"]}
LIMITS = Limits(max_bytes=100_000, images=4, frames=3, side=64, header_bytes=4096, prompt_bytes=50)
# (what, content type, body, status, a part of the message)
REFUSED = [
    ("pickle", "application/octet-stream", b"\x80\x04cos\nsystem\n.", 415, "Content-Type: got"),
    ("a pickle that says it is none", SAFETENSORS, b"\x80\x04cos\nsystem\n" * 9, 413, "header"),
    ("nothing", SAFETENSORS, b"", 400, "ends after 0 bytes"),
    ("cut", SAFETENSORS, body_of()[:-1], 400, "safetensors"),
    ("cut head", SAFETENSORS, body_of()[:20], 400, "ends after 20 bytes"),
    ("more behind it", SAFETENSORS, body_of() + b"x", 400, "safetensors"),
    ("garbage", SAFETENSORS, (7).to_bytes(8, "little") + b"garbage" * 9, 400, "JSONDecodeError"),
    ("deep", SAFETENSORS, (4000).to_bytes(8, "little") + b"[" * 4000, 400, "header"),
    ("another tensor", SAFETENSORS, blob({"pixels": PIXELS}), 422, "one tensor, images"),
    (
        "two tensors",
        SAFETENSORS,
        blob({"images": PIXELS, "frames": PIXELS.clone()}),
        422,
        "one tensor",
    ),
    ("no request", SAFETENSORS, save({"images": PIXELS}), 422, '"request"'),
    ("floats", SAFETENSORS, blob({"images": PIXELS.float()}), 422, "images: got F32"),
    ("channels last", SAFETENSORS, blob({"images": PIXELS.mT.reshape(2, 4, 4, 3)}), 422, "3, H, W"),
    (
        "a video as images",
        SAFETENSORS,
        blob({"images": PIXELS[:, None]}),
        422,
        "images: got U8 of 5",
    ),
    (
        "N too large",
        SAFETENSORS,
        blob({"images": PIXELS[:1].expand(5, 3, 4, 4).clone()}),
        422,
        "5,",
    ),
    (
        "F too large",
        SAFETENSORS,
        blob({"frames": torch.zeros(2, 4, 3, 4, 4).byte()}),
        422,
        "frames",
    ),
    (
        "a side too long",
        SAFETENSORS,
        blob({"images": torch.zeros(2, 3, 65, 1).byte()}),
        422,
        "side",
    ),
    (
        "too many bytes",
        SAFETENSORS,
        blob({"images": torch.zeros(4, 3, 64, 200).byte()}),
        413,
        "body",
    ),
    ("a long prompt", SAFETENSORS, body_of(prompts=["a", "é" * 26]), 422, "one of 52 bytes"),
    ("half a character", SAFETENSORS, blob({"images": PIXELS}, HALF), 422, "surrogate"),
    ("a head too long", SAFETENSORS, body_of(metadata=[{"a": "x" * 5000}, {}]), 413, "header"),
    ("a prompt too few", SAFETENSORS, body_of(prompts=["a"]), 422, "prompts: got 1, expected 2"),
    ("a group too many", SAFETENSORS, body_of(group=[1, 2, 3]), 422, "group: got 3, expected 2"),
    ("no reward", SAFETENSORS, body_of(rewards=[]), 422, "rewards: got none"),
    ("an unknown reward", SAFETENSORS, body_of(rewards=["red"]), 404, "expected one of redness"),
    ("a request that is none", SAFETENSORS, blob({"images": PIXELS}, [1]), 422, "dictionary"),
    ("another protocol", SAFETENSORS, blob({"images": PIXELS}, {"protocol": 2}), 422, "protocol"),
    ("no JSON", JSON, b'{"images": [', 400, "JSON"),
    ("JSON that is no object", JSON, b"[]", 422, "expected an object"),
    ("deep JSON", JSON, b"[" * 90_000, 400, "RecursionError"),
    ("an unknown field", JSON, with_images(other_file("PNG"), fps=3), 422, "fps: Extra inputs"),
    ("no base64", JSON, with_images("ÿÿ"), 422, "images.0: is not base64"),
    (
        "no list",
        JSON,
        json.dumps({**json.loads(with_images()), "images": 3}),
        422,
        "images: expected",
    ),
    ("no images", JSON, with_images(), 422, "images: got none"),
    ("JPEG", JSON, with_images(other_file("JPEG")), 422, "images.0: expected PNG, or lossless"),
    ("lossy WebP", JSON, with_images(other_file("WEBP", quality=80)), 422, "lossless WebP"),
    ("transparency", JSON, with_images(other_file("PNG", "RGBA")), 422, "got RGBA, expected RGB"),
    ("a PNG of 9000 x 9000", JSON, with_images(forged_png(9000, 9000)), 422, "side: got 9000"),
    ("a PNG cut", JSON, with_images(forged_png(60, 60)), 422, "images.0: "),
    ("five files", JSON, with_images(*[other_file("PNG")] * 5), 422, "images: got 5"),
]


def test_what_is_no_request_is_refused_in_a_line(served, capfd):
    service = served(limits=LIMITS)
    for what, kind, body, status, message in REFUSED:
        got, found = service.post(body, kind)
        assert (got, what) == (status, what), found
        said = found["error"]["message"]
        assert message in said, (what, said)
        assert len(said) <= 500 and "\n" not in said and "Traceback" not in said
    assert service.service.rewards["redness"].reward.calls == []
    assert service.post(body_of())[0] == 200, "and the server is as well as before"
    assert "Traceback" not in capfd.readouterr().err


def test_files_unpack_to_as_much_as_a_body_may_have(served):
    service = served(limits=Limits(max_bytes=10_000))
    status, found = service.post(with_images(*[forged_png(40, 40)] * 3), JSON)
    assert status == 413 and "14400 bytes unpacked" in found["error"]["message"]


def test_a_token_is_asked_for_and_not_said_back(served):
    service = served(token="right-1")
    for given in ("", "Bearer ", "Bearer wrong", "Basic right-1", "Bearer right-12", "Bearer ü"):
        status, found = service.post(body_of(), authorization=given.encode())
        assert status == 401 and found["error"]["code"] == "unauthorized"
    assert service.post(body_of())[0] == 200
    assert Http(URL, transport=service.http.transport).get("/healthz").json() == {"status": "ok"}
    with pytest.raises(RewardError, match=r"/v1/info: answered 401: Authorization") as error:
        RemoteReward("redness", url=URL)
    assert not isinstance(error.value, Unscored)


def test_a_body_that_comes_by_drops_is_not_waited_for(served):
    service = served(upload_s=0.1)

    async def drops():
        for byte in body_of():
            yield bytes([byte])
            await asyncio.sleep(0.02)

    status, found = service.post(drops())
    assert status == 408 and found["error"]["code"] == "slow"


def test_a_server_that_is_full_or_ends_says_when_to_come_back(served):
    go = threading.Event()

    def stuck(images, prompts, metadata):
        go.wait(30)
        return [0.0] * len(images)

    service = served(rewards={"redness": stuck}, requests=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(service.post, body_of())
        wait_for(lambda: service.service._running)
        assert service.post(body_of())[0] == 429
        # What is at work when the server ends has no answer, which is no score of 0.
        service.service.close()
        assert first.result(10)[0] == 503
        go.set()
    assert service.post(body_of())[0] == 503


# ---- asking again ----


def test_a_replay_is_answered_from_memory(served):
    watch = [0.0]
    service = served(clock=lambda: watch[0])
    reward = service.service.rewards["redness"].reward
    first = service.post(body_of(), idempotency_key="k")
    assert service.post(body_of(), idempotency_key="k") == first and reward.calls == [2]
    status, found = service.post(body_of(prompts=["b", "b"]), idempotency_key="k")
    assert status == 409 and found["error"]["code"] == "key_reused"
    assert service.post(body_of(), idempotency_key="x" * 129)[0] == 400
    watch[0] = 601  # ten minutes later
    assert service.post(body_of(), idempotency_key="k")[0] == 200 and reward.calls == [2, 2]
    # What failed is scored again, as it may go well.
    for calls in (3, 4):
        assert service.post(body_of(prompts=["fail"] * 2), idempotency_key="f")[0] == 500
        assert len(reward.calls) == calls


def test_one_that_is_asked_twice_at_once_is_scored_once(served):
    go, calls = threading.Event(), []

    def slow(images, prompts, metadata):
        calls.append(len(images))
        go.wait(30)
        return [1.5] * len(images)

    service = served(rewards={"redness": slow}, requests=1)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(service.post, body_of(), idempotency_key="k") for _ in range(2)]
        wait_for(lambda: calls)
        time.sleep(0.05)
        go.set()
        first, second = (one.result(10) for one in both)
    assert first == second and first[0] == 200 and calls == [2]


# ---- what the client makes of it ----


def test_an_image_without_a_score_is_nan_and_said(served):
    served()
    remote = RemoteReward("redness", url=URL)
    with pytest.warns(UserWarning, match="no score for 1 of 3 images: the reward gave nan"):
        found, _ = remote(images(3), ["a", "nan", "b"], [{}] * 3)
    assert found.isnan().tolist() == [False, True, False]
    with pytest.raises(Unscored, match="answered 500: redness: .*out of paint; tried 5 times"):
        remote(images(2), ["a", "fail"], [{}] * 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"name": "rednes"},
            "name: got 'rednes', but .* serves redness, rank; did you mean 'redness'",
        ),
        ({"url": "server:1"}, "url: got 'server:1', expected http://"),
        ({"format": "jpeg"}, "format: got 'jpeg', expected raw or webp"),
        ({"formt": "raw"}, "formt: unknown key; did you mean 'reward.quality.format'"),
        ({"frames": 0}, "frames: got 0, expected a whole number"),
        ({"batch": 257}, "batch: got 257, expected 1 to 256"),
        ({"retries": -1}, "retries: got -1"),
        ({"request_timeout": 0}, "request_timeout: expected"),
        (
            {"token_env": "NO_SUCH_TOKEN"},
            "token_env: the environment variable NO_SUCH_TOKEN is not",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_a_run(served, options, said):
    served()
    with pytest.raises(ConfigError, match=rf"^reward\.quality\.{said}"):
        load_rewards(
            build(
                Rewards, {"quality": {"kind": "remote", "name": "redness", "url": URL, **options}}
            )
        )


ABOUT = {
    "protocol": [1],
    "rewards": {"r": {"version": "1", "takes_group": False, "scales": {}, "default_scale": None}},
    "limits": {"images": 256, "max_bytes": 10**9},
}
GOOD = {
    "protocol": 1,
    "request_id": "ID",
    "rewards": {"r": [1.5, 2]},
    "info": {},
    "errors": [],
    "versions": {"r": "1"},
}


@pytest.fixture
def replying(monkeypatch):
    """remote(reply): a client of a server that replies so; "ID" in it is that of the request."""

    def remote(reply, about=ABOUT):
        def handle(request):
            if request.method == "GET":
                return httpx.Response(200, json=about)
            text = reply if isinstance(reply, str) else json.dumps(reply)
            return httpx.Response(200, text=text.replace("ID", request.headers["idempotency-key"]))

        web = functools.partial(Http, transport=httpx.MockTransport(handle))
        monkeypatch.setattr("flowkern.rewards.asking.Http", web)
        return RemoteReward("r", url=URL)

    return remote


def test_a_good_reply(replying):
    found, info = replying(GOOD)(images(2), ["a", "b"], [{}, {}])
    assert found.tolist() == [1.5, 2.0] and info == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rewards": {"r": [1.5]}}, "has 1 scores; expected 2, one per image"),
        ({"rewards": {"r": [1.5, 2, 3]}}, "has 3 scores; expected 2"),
        ({"rewards": {"r": [[1.5, 2]]}}, r"has rewards\.r\.0: Input should be a valid number"),
        ({"rewards": {"r": [1.5, "2"]}}, r"has rewards\.r\.1: Input should be a valid number"),
        ({"rewards": {"r": [True, 2]}}, r"has rewards\.r\.0: "),
        ({"rewards": {"r": None}}, r"has rewards\.r: Input should be a valid list"),
        ({"rewards": {"s": [1.5, 2]}}, "lacks 'r'"),
        ({"info": {"r": {"e": [1]}}}, "has 1 e; expected 2"),
        ({"request_id": "other"}, "is of another request"),
        ({"protocol": 2}, "has protocol: "),
        ("<html>", "is not JSON"),
        ('{"rewards": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"text": "' + "a" * 10**7, "is longer than 4194304 bytes"),
    ],
)
def test_a_reply_that_is_none_is_no_score(replying, change, said):
    reply = change if isinstance(change, str) else GOOD | change
    with pytest.raises(Unscored, match=f"^{URL}/v1/score: the answer {said}") as error:
        replying(reply)(images(2), ["a", "b"], [{}, {}])
    assert len(str(error.value)) < 350


def test_numbers_that_are_none_are_nan(replying):
    text = json.dumps(GOOD).replace("[1.5, 2]", "[NaN, 1e999]")
    with pytest.warns(UserWarning, match="no score for 2 of 2 images: the server does not say why"):
        found, _ = replying(text)(images(2), ["a", "b"], [{}, {}])
    assert found.isnan().all()


def test_a_reward_that_became_another_ends_the_run(replying):
    with pytest.raises(RewardError, match="r is '2' now and was '1'") as error:
        replying(GOOD | {"versions": {"r": "2"}})(images(2), ["a", "b"], [{}, {}])
    assert not isinstance(error.value, Unscored)


def test_a_warning_is_a_plain_line_of_a_run(replying, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # as it was afterwards
    quiet()
    asked = KeyedReward("reward.far", 1.0, replying(json.dumps(GOOD).replace("1.5", "NaN")))
    with pytest.warns(UserWarning) as told:
        Call.of(asked, images(2), [{"prompt": "a"}, {"prompt": "b"}]).ask()
    said = [
        warnings.formatwarning(one.message, one.category, one.filename, one.lineno) for one in told
    ]
    why = "no score for 1 of 2 images: the server does not say why"
    assert said == [f"warning: r at {URL}: {why}\n"]
    other = warnings.formatwarning("mine", UserWarning, "/home/me/reward.py", 3)
    assert other.startswith("/home/me/reward.py:3: UserWarning: mine"), "whose place helps"


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({**ABOUT, "protocol": [2, 3]}, "speaks protocol 2, 3; expected 1"),
        ({"object": "list"}, "serves no rewards: protocol: Field required"),
        ([], "serves no rewards: all of it: "),
    ],
)
def test_another_server(replying, about, said):
    with pytest.raises(ValueError, match=f"^url: {URL} {said}"):
        replying(GOOD, about)


@pytest.mark.parametrize(
    "pixels", [images(2) * 255, images(2) * 2 - 1, images(2) + torch.nan, images(2)[0]]
)
def test_pixels_out_of_range_are_not_sent(replying, pixels):
    with pytest.raises(ValueError, match="^(images|prompts): got"):
        replying(GOOD)(pixels, ["a", "b"], [{}, {}])


def test_a_server_that_hangs_or_breaks_costs_its_time_alone(monkeypatch):
    def about(connection, _):
        connection.sendall(answer(json.dumps(ABOUT).encode()))

    def cut(connection, _):
        connection.sendall(answer(b'{"protocol": 1, "rew', length=500))

    def hang(connection, is_over):
        is_over.wait(120)

    with misbehaving(about, cut, hang) as (url, requests):
        remote = RemoteReward("r", url=url, request_timeout=2.0)
        begin = time.monotonic()
        with pytest.raises(Unscored, match="/v1/score: no answer within 2 s"):
            remote(images(2), ["a", "b"], [{}, {}])
        assert time.monotonic() - begin < 30, "it waits for a server that takes 120 s"
    keys = {re.search(rb"idempotency-key: (\w+)", head)[1] for head, _ in requests[1:]}
    assert len(requests) == 3 and len(keys) == 1 and len({body for _, body in requests[1:]}) == 1


# ---- the package ----


def test_no_pickle_comes_in():
    """Nothing imports what unpickles, and torch.load is held to tensors."""
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    suspicious = re.compile(rf"torch\.load|allow_pickle|{'|'.join(banned)}")
    sources = {path: path.read_text() for path in (ROOT / "flowkern").rglob("*.py")}
    held = 0
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)) if suspicious.search(text) else ():
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & banned, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
                assert safe == "True", path
                held += 1
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path
    assert held >= 2
