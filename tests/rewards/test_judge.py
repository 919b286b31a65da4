"""A judge behind OpenAI's chat completions: what is read of answers, and what is asked."""

import base64
import io
import math
import time

import numpy as np
import pytest
import torch

from flowkern.rewards import RewardError, Unscored, load_reward
from flowkern.rewards.answers import expected_value, stated_score

NAN = math.nan


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Final Score: 4", 4),
        ("**Final Score** (1-5): **3.5**", 3.5),
        ("**Final Score:** 4", 4),
        ("### final score = `2`\n", 2),
        ("FINAL  SCORE\n4.", 4),
        ("Final Score: [3]", 3),
        ("Final Score: 1, no: Final Score: 5", 5),
        ("<think>Final Score: 1?</think>\n__Final Score__: 4/5", 4),
        ("Final Score: 10", NAN),
        ("Final Score: 5.9", NAN),
        ("Final Score: -3", NAN),
        ("Final Score: 4, then Final Score: -3", NAN),
        ("Final Score: 4/10", NAN),
        ("Final Score: 4e2", NAN),
        ("Semifinal Score: 4", NAN),
        ("Final", NAN),
        ("", NAN),
        ("Final Score: N/A", NAN),
        ("4", NAN),
    ],
)
def test_a_stated_score_survives_markdown_and_is_held_to_its_range(text, expected):
    assert stated_score(text, ["Final Score"], 1, 5) == pytest.approx(expected, nan_ok=True)


def test_several_labels_are_averaged_without_those_that_do_not_apply():
    labels = ["Alignment", "Coherence", "Style"]
    text = "**Alignment**: 4\n**Coherence Score**: 1\nCoherence: 3\n- Style (1-5): {}"
    assert stated_score(text.format("2.5"), labels, 1, 5) == pytest.approx((4 + 3 + 2.5) / 3)
    assert stated_score(text.format("N/A"), labels, 1, 5) == 3.5
    assert math.isnan(stated_score(text.format("good"), labels, 1, 5))


@pytest.mark.parametrize("tail", ["*", " ", "(", "Final Score(", "Final ", ":"])
def test_a_long_answer_without_a_number_is_read_at_once(tail):
    begin = time.thread_time()
    assert math.isnan(stated_score("Final Score" + tail * 20_000, ["Final Score"], 1, 5))
    assert time.thread_time() - begin < 2, "some hundredths; it grew with the cube of the length"


def test_expected_value_is_a_mean_over_the_tokens_that_count():
    digits = {str(k): float(k) for k in range(1, 6)}
    top = [("4", math.log(0.5)), (" 5", math.log(0.3)), ("The", math.log(0.2)), ("1", -9999.0)]
    assert expected_value(top, digits) == pytest.approx((4 * 0.5 + 5 * 0.3) / 0.8)
    assert math.isnan(expected_value(top[1:], digits)), "0.3 of the probability"
    assert math.isnan(expected_value([("4", NAN), ("x", 0.0)], digits))
    assert math.isnan(expected_value([("1", -9999.0)], digits, least=0)), "no division by 0"
    yes = [("Yes", math.log(0.4)), (" yes", math.log(0.2)), ("NO", math.log(0.2))]
    assert expected_value(yes, {"yes": 1, "no": 0}) == pytest.approx(0.6 / 0.8)


@pytest.fixture
def judge(tmp_path):
    def made(text="Rate {prompt} as {json: 1}", **options):
        file = tmp_path / "judge.txt"
        file.write_text(text)
        defaults = {"url": "http://judge:8000/v1", "model": "vlm", "prompt_file": str(file)}
        return load_reward("vlm_judge", **defaults | options)

    return made


def said(text):
    return {"choices": [{"message": {"content": text}}]}


def test_what_is_asked_and_what_is_made_of_it(judge, served):
    from PIL import Image

    reward = judge(size=6, extra_body={"seed": 3}, max_tokens_key="max_completion_tokens")
    seen = {}

    def answer(body):
        image, text = body["messages"][0]["content"]
        kind, _, data = image["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64", "strict servers refuse one without a type"
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
        seen[text["text"]] = pixels, body
        caption = text["text"].split()[1]
        return 200, said({"a": "**Final Score**: 4", "{b}": "I cannot say."}[caption])

    images = torch.stack([torch.full((3, 4, 8), 0.5), torch.zeros(3, 4, 8)])
    requests = served(reward, answer)
    with pytest.warns(UserWarning, match="1 of 2 answers have no score .*I cannot say"):
        scores, info = reward(images, ["a", "{b}"], [{}, {}])
    assert scores.tolist() == pytest.approx([4, NAN], nan_ok=True)
    assert info["unread"].tolist() == [0, 1]
    pixels, body = seen["Rate a as {json: 1}"]
    assert pixels.shape == (6, 6, 3) and (pixels == 128).all()
    assert body["seed"] == 3 and body["temperature"] == 0 and body["model"] == "vlm"
    assert body["max_completion_tokens"] == 1024 and "max_tokens" not in body
    assert "logprobs" not in body
    assert requests[0].url == "http://judge:8000/v1/chat/completions"


@pytest.mark.parametrize(
    ("options", "token", "expected"),
    [
        ({"answer": "logprob"}, "4", 4),
        ({"answer": "yes_no"}, " Yes", 1),
        ({"answer": "logprob", "levels": {"Excellent": 5, "bad": 1}, "max_tokens": 3}, "bad", 1),
    ],
)
def test_scores_by_log_probability(judge, served, options, token, expected):
    reward = judge(**options)

    def answer(body):
        assert body["logprobs"] is True and body["top_logprobs"] == 20
        assert body["max_tokens"] == options.get("max_tokens", 1)
        places = [{"token": token, "top_logprobs": [{"token": token, "logprob": -0.1}]}]
        if body["max_tokens"] > 1:
            places.insert(0, {"token": "\n", "top_logprobs": [{"token": "\n", "logprob": 0.0}]})
        return 200, {"choices": [{"logprobs": {"content": places}}]}

    served(reward, answer)
    assert reward(torch.zeros(1, 3, 4, 4), ["a"])[0].tolist() == [expected]


@pytest.mark.parametrize("token", [None, 4])
def test_tokens_that_are_no_text_are_no_score(judge, served, token):
    reward = judge(answer="logprob", retries=0)
    top = [{"token": token, "logprob": 0.0}]
    places = [{"token": token if token is None else "4", "top_logprobs": top}]
    served(reward, lambda body: (200, {"choices": [{"logprobs": {"content": places}}]}))
    with pytest.raises(Unscored, match="has no log-probabilities"):
        reward(torch.zeros(1, 3, 4, 4), ["a"])


def test_what_a_judge_fails_at_has_no_score_and_a_refusal_ends(judge, served, monkeypatch):
    reward = judge(retries=0)
    images = torch.zeros(3, 3, 4, 4)
    replies = {"a": (200, said("Final Score: 2")), "b": (500, {}), "c": (200, {"choices": []})}
    served(reward, lambda body: replies[body["messages"][0]["content"][1]["text"].split()[1]])
    scores, info = reward(images, list("abc"))
    assert scores.tolist() == pytest.approx([2, NAN, NAN], nan_ok=True)
    assert info["unread"].tolist() == pytest.approx([0, NAN, NAN], nan_ok=True)
    with pytest.raises(Unscored, match="answered 500"):
        reward(images[:1], ["b"])
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    reward = judge(token_env="JUDGE_TOKEN")
    asked = served(reward, lambda body: (401, {"error": "s3cret is wrong"}))
    with pytest.raises(RewardError, match="answered 401.*the token") as refused:
        reward(images[:1], ["a"])
    assert not isinstance(refused.value, Unscored) and len(asked) == 1
    assert asked[0].headers["authorization"] == "Bearer s3cret"


def test_options_are_held_to(judge):
    for options, what in (
        ({"answer": "score"}, "answer: got 'score', expected one of text"),
        ({"max_tokens_key": "tokens"}, "max_tokens_key: got"),
        ({"prompt_file": "nowhere.txt"}, "prompt_file: 'nowhere.txt' cannot be read"),
        ({"text": "Rate it"}, "has no {prompt}, where the caption goes"),
        ({"high": 1}, "high: expected more than low"),
        ({"labels": []}, "labels: got"),
        ({"labels": 5}, "labels: got 5"),
        ({"low": 1.2, "high": 1.5, "answer": "logprob"}, "levels: missing"),
        ({"levels": {"a": 1, "b": 2}}, "levels: only answer: logprob reads it; it is text"),
        ({"levels": {"a": 1}, "answer": "logprob"}, "levels: got"),
        ({"high": 100, "answer": "logprob"}, "levels: missing; low to high"),
        ({"placeholder": ""}, "placeholder: got ''"),
        ({"placeholder": 5}, "placeholder: got 5, expected a string or null"),
        ({"temperature": "hot"}, "temperature: got 'hot', expected a number or null"),
        ({"temperature": float("inf")}, "temperature: expected 0 or more"),
        ({"size": 10**9}, "size: got 1000000000, expected at most"),
        ({"prompt_file": "a\0b"}, "prompt_file: .* cannot be read"),
        ({"extra_body": {"messages": []}}, "extra_body: has messages"),
        ({"extra_body": {"seed": float("nan")}}, "extra_body: cannot be sent"),
        ({"min_probability": 0.2}, "min_probability: only answer: logprob and yes_no reads it"),
        ({"top_logprobs": 5}, "top_logprobs: only answer"),
        ({"answer": "logprob", "labels": ["Style"]}, "labels: only answer: text reads it"),
        ({"answer": "yes_no", "high": 10}, "high: only answer"),
        (
            {"answer": "logprob", "levels": {"a": 1, "b": 2}, "high": 9},
            "high: is not read beside levels",
        ),
        ({"reduce": "first", "frames": "all"}, "frames: got 'all', but reduce: first"),
        ({"concurrency": 0}, "concurrency: got 0, expected a whole number"),
        ({"url": "judge"}, "url: got 'judge'"),
        ({"token_env": "NO_SUCH_VARIABLE"}, "token_env: the environment variable"),
        ({"max_token": 3}, "did you mean 'reward.vlm_judge.max_tokens'"),
    ):
        with pytest.raises(ValueError, match=what):
            judge(**options)
    assert judge("Rate it", placeholder=None)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"vlm_judge": {"url": "http://a/v1", "model": "m"}}, "vlm_judge.prompt_file: missing"),
        (
            {"j": {"kind": "vlm_judge", "url": "a", "model": "m", "prompt_file": "/"}},
            "j.prompt_file",
        ),
        ({"ocr": {"rule": "none"}}, "ocr.rule: got 'none'"),
        ({"g": {"kind": "geneval", "url": "a"}}, "g.url: got 'a'"),
        ({"v": {"kind": "videoalign", "url": "http://a", "token_env": "NONE"}}, "v.token_env: the"),
        ({"imagereward": {"tokenizer": "no/such/place"}}, "imagereward.tokenizer: "),
        ({"h": {"kind": "hpsv3", "instruction": "no-such-file"}}, "h.instruction: 'no-such-file'"),
        ({"jpeg_compressibility": {"quality": 90}}, "jpeg_compressibility.quality: unknown key"),
    ],
)
def test_a_configuration_is_told_the_key_in_a_line(reward, said, monkeypatch):
    """Of every reward of this kind, before anything else is loaded."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from flowkern.checks import ConfigError
    from flowkern.train.config import Rewards
    from flowkern.train.scoring import load_rewards

    monkeypatch.delenv("NONE", raising=False)
    with pytest.raises(ConfigError, match=rf"^reward\.{said}") as error:
        load_rewards(
            Rewards.model_validate({n: {"weight": 1.0} | one for n, one in reward.items()})
        )
    assert "\n" not in str(error.value)
