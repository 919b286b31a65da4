"""Turns drawn by a server: token for token and log-prob for log-prob what the model itself gives,
and a reason for each turn that a server spoils."""

import asyncio
import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("httpx2", reason="httpx2 is not installed: pip install 'flowkern[agent]'")
import servers
from model_server import STOP, VOCABULARY, ModelServer, Words, tiny_model
from peft import LoraConfig, get_peft_model

from flowkern.agent.engines import Sampling
from flowkern.agent.engines.server import ServerEngine
from flowkern.checks import ConfigError

QUICK = {"timeout_s": 20, "deadline_s": 60, "retries": 1, "backoff_s": 0, "max_bytes": 100_000}
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=6, stop_ids=(STOP, 5, 6))
PROMPTS = [[7, 8, 9], [10, 11, 12, 13], [2, 3]]
SEEDS = [5, 2**62, 7]


def adapted(seed=0):
    """The tiny model with a LoRA that changes what it says."""
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    return model.eval()


def engine(server, trained, sampling=SAMPLING, **options):
    options = {
        "url": server.url,
        "model": "tiny",
        "serves": server.serves,
        "patience": QUICK,
        **options,
    }
    return ServerEngine(options, model=trained, tokenizer=Words(), sampling=sampling)


@pytest.fixture(scope="module")
def base():
    return tiny_model()


@pytest.fixture(scope="module")
def lora():
    return adapted()


@pytest.fixture(params=["vllm", "sglang"])
def server(request, base):
    with ModelServer(base, request.param) as server:
        yield server


@pytest.fixture(scope="module")
def one_by_one(base, lora, tmp_path_factory):
    """A server and an engine that asks it for one row after the other."""
    with ModelServer(base) as server:
        drawer = engine(server, lora, patience={**QUICK, "concurrency": 1})
        drawer.sync(lora, tmp_path_factory.mktemp("run"))
        yield server, drawer


def turns(engine, sampling=SAMPLING, prompts=PROMPTS, seeds=SEEDS):
    return asyncio.run(engine.generate(prompts, sampling, seeds))


@torch.no_grad()
def log_probs(model, turn, temperature):
    logits = model(torch.tensor([turn.prompt_ids + turn.ids])).logits[0].double() / temperature
    at = torch.arange(len(turn.ids)) + len(turn.prompt_ids) - 1
    return logits.log_softmax(-1)[at, torch.tensor(turn.ids)].tolist()


def test_token_for_token(server, lora, tmp_path):
    """Each row by itself, by seed, whatever the batch; the log-probs are the model's own."""
    plain = Sampling(temperature=0.7, top_p=1.0, max_new_tokens=6, stop_ids=(STOP, 5, 6))
    drawer = engine(server, lora, plain)
    drawer.sync(lora, tmp_path)
    rows = turns(drawer, plain)
    assert [row.prompt_ids for row in rows] == PROMPTS
    for row in rows:
        assert row.failure is None and row.finish == (
            "stop" if row.ids[-1] in plain.stop_ids else "length"
        )
        assert row.log_probs == pytest.approx(log_probs(lora, row, 0.7), abs=1e-5)
    assert {row.finish for row in rows} == {"stop", "length"}
    backwards = turns(drawer, plain, PROMPTS[::-1], SEEDS[::-1])
    assert backwards == rows[::-1] and turns(drawer, plain, PROMPTS[:1], SEEDS[:1]) == rows[:1]
    greedy = turns(drawer, Sampling(temperature=0.0, max_new_tokens=6, stop_ids=(STOP,)))
    assert [row.log_probs for row in greedy] == [None] * 3
    assert not drawer.is_exact and drawer.calls == 0
    assert any(server.url in fact for fact in drawer.facts)


def test_weights_are_brought_and_the_server_is_asked(server, base, tmp_path):
    """What it drew with is what was trained last; earlier adapters are gone, here and there."""
    first, second = adapted(1), adapted(2)
    drawer, other_rank = engine(server, first), engine(server, first)
    with pytest.raises(RuntimeError, match="has no adapter flowkern-N"):
        turns(drawer)
    plain = Sampling(temperature=1.0, max_new_tokens=6)
    for number, model in [(0, first), (0, first), (1, second)]:  # equal ones go there once
        drawer.sync(model, tmp_path)
        assert list(server.adapters) == [f"flowkern-{number:06d}"]
        assert [p.name for p in (tmp_path / "server").iterdir()] == list(server.adapters)
        for rank in (drawer, other_rank):
            for row in turns(rank, plain):
                assert row.log_probs == pytest.approx(log_probs(model, row, 1.0), abs=1e-5)
    server.adapters.clear()
    with pytest.raises(RuntimeError, match="started anew since"):
        turns(drawer)
    drawer.sync(second, tmp_path)  # equal, and lost
    assert list(server.adapters) == ["flowkern-000000"]


def test_all_weights_through_the_disk(tmp_path, monkeypatch):
    folder = tmp_path / "both"
    folder.mkdir()
    trained = tiny_model(3)
    with ModelServer(tiny_model(), "sglang") as server:
        options = {"weights": "disk", "folder": str(folder), "folder_on_server": str(folder)}
        drawer = engine(server, trained, Sampling(max_new_tokens=6), **options)
        with pytest.raises(RuntimeError, match="has the weights of tiny: it was started anew"):
            turns(drawer)
        last = trained.model.norm.weight
        for number, change in enumerate([torch.zeros_like(last), torch.arange(16) == 9]):
            last.data += 2**-20 * change
            for _ in range(2):
                drawer.sync(trained, tmp_path)
            assert server.path == str(folder / f"flowkern-{number:06d}")
            assert [str(path) for path in folder.iterdir()] == [server.path]
        for row in turns(drawer, Sampling(max_new_tokens=6)):
            assert row.log_probs == pytest.approx(log_probs(trained, row, 1.0), abs=1e-5)
        elsewhere = {**options, "folder_on_server": "/not/there"}
        astray = engine(server, trained, Sampling(max_new_tokens=6), **elsewhere)
        with pytest.raises(RuntimeError, match="did not take the weights: answered 400"):
            astray.sync(trained, tmp_path)
        monkeypatch.setitem(server.routes, "/update_weights_from_disk", lambda _: {"success": True})
        last.data = last.data.roll(1)  # the same values at other places
        with pytest.raises(RuntimeError, match="it has the weights of .*, not of "):
            drawer.sync(trained, tmp_path)


def test_an_adapter_that_is_not_there_afterwards(lora, base, tmp_path, monkeypatch):
    with ModelServer(base, adapters=False) as server:
        drawer = engine(server, lora)
        with pytest.raises(RuntimeError, match="answered 404.*--enable-lora") as caught:
            drawer.sync(lora, tmp_path)
        assert "\n" not in str(caught.value)
        monkeypatch.setitem(server.routes, "/v1/load_lora_adapter", lambda _: {"success": True})
        with pytest.raises(RuntimeError, match="it does not list flowkern-000000"):
            drawer.sync(lora, tmp_path)


def test_loaded_by_an_attempt_whose_answer_was_lost(server, lora, tmp_path):
    drawer = engine(server, lora)
    server.faults.extend([None, servers.DROPPED])
    drawer.sync(lora, tmp_path)
    assert list(server.adapters) == ["flowkern-000000"]


def edited(path, value):
    """An answer with something else at a path of it."""

    def edit(answer):
        *way, last = path
        at = answer
        for key in way:
            at = at[key]
        at[last] = value(at[last]) if callable(value) else value

    return edit


CHOICE = ("choices", 0)
EDITS = {
    "fewer ids than text": (
        edited((*CHOICE, "token_ids"), lambda ids: ids[:-1]),
        r"\d token ids with \d log-prob",
    ),
    "fewer of both": (
        edited(("usage", "completion_tokens"), 60),
        "token ids of a turn of 60 tokens",
    ),
    "no ids": (edited((*CHOICE, "token_ids"), None), r"no token ids \(token_ids\)"),
    "ids out of range": (
        edited((*CHOICE, "token_ids", 0), VOCABULARY),
        f"token id {VOCABULARY} of a vocabulary of {VOCABULARY}",
    ),
    "an id below 0": (edited((*CHOICE, "token_ids", 0), -1), "token id -1 of a vocabulary"),
    "ids of text": (edited((*CHOICE, "token_ids", 0), "7"), r"no token ids \(token_ids\)"),
    "another prompt": (
        edited((*CHOICE, "prompt_token_ids"), lambda ids: [0, *ids]),
        "changed the prompt's token ids",
    ),
    "no log-probs": (edited((*CHOICE, "logprobs"), None), "no log-probabilities"),
    "a log-prob above 0": (
        edited((*CHOICE, "logprobs", "token_logprobs", 0), 0.5),
        "no log-probabilities",
    ),
    "a log-prob that is none": (
        edited((*CHOICE, "logprobs", "token_logprobs", 0), math.nan),
        "no log-probabilities",
    ),
    "aborted": (edited((*CHOICE, "finish_reason"), "abort"), "the turn ended by 'abort'"),
    "no choice": (edited(("choices",), []), "the turn ended by None"),
    "a list": (lambda answer: [1], "the turn ended by None"),
    "too many tokens": (
        lambda answer: {
            "choices": [
                {
                    "finish_reason": "length",
                    "prompt_token_ids": PROMPTS[0],
                    "token_ids": [3] * 99,
                    "logprobs": {"token_logprobs": [-1.0] * 99},
                }
            ]
        },
        "99 tokens, 6 were asked for",
    ),
    "the stop id left out": (
        edited((*CHOICE, "stop_reason"), 39),
        "the token id 39 that ended the turn is left out",
    ),
}


@pytest.mark.parametrize("fault", EDITS)
def test_a_turn_that_cannot_be_trained_on(one_by_one, fault):
    """One row fails, with its reason; the others stand."""
    server, drawer = one_by_one
    edit, reason = EDITS[fault]
    server.edits.append(edit)
    bad, *good = turns(drawer)
    assert (bad.finish, bad.ids, bad.log_probs) == ("failed", [], None)
    assert bad.prompt_ids == PROMPTS[0]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad.failure)
    assert all(row.failure is None and row.ids for row in good)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (servers.DROPPED, "the connection broke: .*; tried 2 times"),
        (servers.HUNG_UP, "the connection broke: .*; tried 2 times"),
        (servers.BUSY, "answered 429: too many; tried 2 times"),
        (servers.BROKEN, "answered 500: .*; tried 2 times"),
        (servers.FLOOD, "longer than 100000 bytes"),
        (servers.NOT_JSON, "the answer is not JSON"),
    ],
    ids=["dropped", "hung up", "429", "500", "ten megabytes", "html"],
)
def test_a_server_that_fails_mid_turn(one_by_one, fault, reason):
    server, drawer = one_by_one
    server.faults.extend([None, fault, fault])  # it is first asked which adapter it has
    bad, *good = turns(drawer)
    assert bad.finish == "failed" and "\n" not in bad.failure
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad.failure)
    is_tried_again = "tried" in reason  # what is not spoils two rows
    assert [row.failure is None for row in good] == [is_tried_again, True]


def test_a_server_that_fails_before_the_first_turn(one_by_one):
    server, drawer = one_by_one
    server.faults.extend([servers.BROKEN] * 2)
    reasons = {row.failure for row in turns(drawer)}
    assert reasons == {"answered 500: Internal Server Error; tried 2 times"}
    assert turns(drawer, prompts=[], seeds=[]) == []


def test_bytes_by_drops(one_by_one, lora):
    server, _ = one_by_one
    patience = {**QUICK, "timeout_s": 0.5, "concurrency": 1, "retries": 0}
    drawer = engine(server, lora, patience=patience)
    server.faults.extend([None, servers.BY_DROPS])
    assert turns(drawer)[0].failure == "no answer within 0.5 s"


@pytest.mark.parametrize(
    ("quirk", "sampling", "message"),
    [
        ({"ignores": ["return_token_ids"]}, {}, "gives? no token ids|no token ids.*return_token"),
        ({"raw": True}, {}, "not those of temperature 0.7: start vLLM with --logprobs-mode proc"),
        ({"ignores": ["temperature"]}, {"temperature": 0.3}, "not those of temperature 0.3"),
        ({"ignores": ["top_p"]}, {"temperature": 1.0}, "leaves top_p out of account"),
        ({"raw": True}, {"temperature": 1.0}, "log-probabilities from before top_p"),
    ],
)
def test_a_server_that_cannot_be_trained_with(base, lora, quirk, sampling, message):
    sampling = Sampling(**{"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 6, **sampling})
    with (
        ModelServer(base, **quirk) as server,
        pytest.raises(
            ConfigError, match=f"^agent.engine.url: {server.url} .*({message})"
        ) as caught,
    ):
        engine(server, lora, sampling)
    assert "\n" not in str(caught.value)


def test_raw_log_probs_do_where_nothing_changes_them(base, lora):
    with ModelServer(base, raw=True) as server:
        engine(server, lora, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": None}, "agent.engine.url: missing; the planner is drawn by a server of yours"),
        ({"url": "localhost"}, "agent.engine.url: got 'localhost', expected http://"),
        ({"serves": "ollama"}, "agent.engine.serves: got 'ollama', expected vllm or sglang"),
        ({"weights": "disk"}, "agent.engine.weights: vLLM takes adapters from a folder"),
        ({"weights": "disk", "serves": "sglang"}, "agent.engine.weights: .*a LoRA is trained"),
        ({"patience": {"retries": -1}}, "agent.engine.patience.retries: got -1"),
        ({"token_env": "NOT_SET"}, "agent.engine.token_env: the environment variable NOT_SET"),
        ({"adress": 1}, "agent.engine.adress: unknown key; known are url"),
        ({"modle": 1}, "agent.engine.modle: unknown key; did you mean 'model'"),
        ({"url": "http://127.0.0.1:9"}, "agent.engine.url: .*: cannot connect"),
    ],
)
def test_options_refused(base, lora, options, message):
    """With a model at hand, and before one is loaded."""
    with ModelServer(base) as server:
        with pytest.raises(ConfigError, match=message):
            engine(server, lora, **options)
        if "a LoRA" not in message:
            given = {"url": server.url, "model": "tiny", "serves": "vllm", "patience": QUICK}
            with pytest.raises(ConfigError, match=message):
                ServerEngine.require({**given, **options})


def test_a_server_is_required_before_a_model_is_loaded(base):
    with ModelServer(base) as server:
        given = {"url": f"{server.url}/v1/", "model": "tiny", "serves": "vllm", "patience": QUICK}
        ServerEngine.require(given)
        with pytest.raises(ConfigError, match=r"engine\.model: got 'small', but .* serves tiny$"):
            ServerEngine.require({**given, "model": "small"})
    with pytest.raises(ConfigError, match=r"^agent\.engine\.url: there is no server at .*connect"):
        ServerEngine.require(given)


def test_whole_weights_and_an_adapter_do_not_fit(base):
    with ModelServer(base) as server, pytest.raises(ConfigError, match=r"engine\.weights: .*lora"):
        engine(server, base)


def test_what_is_sent(base, lora, monkeypatch):
    """Everything that changes what is drawn, as a server's defaults are its model's."""
    monkeypatch.setenv("SECRET", "sesame")
    with ModelServer(base) as server:
        engine(server, lora, token_env="SECRET")
        sent = json.loads(server.requests[0].body)
        assert server.requests[0].headers["authorization"] == "Bearer sesame"
    wanted = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"}
    assert wanted | {"frequency_penalty", "seed", "stop_token_ids"} <= sent.keys()
