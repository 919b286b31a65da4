"""Rewards of an agent: what is right, and how a judge's text is read."""

import asyncio
import inspect
import threading

import pytest

from flowkern.agent.answers import judged, load_answer, number_in, require_answer, verdict_in
from flowkern.agent.memory import Query
from flowkern.checks import ConfigError


def scored(kind, answer, right, metadata=None, **options):
    value = load_answer(kind, **options)(answer, Query("q", right, 0, metadata or {}))
    return asyncio.run(value) if inspect.isawaitable(value) else value


@pytest.mark.parametrize(
    "answer, right, score",
    [
        ("42", "42", 1),
        (" **Paris**. ", "paris", 1),
        ("-3", "3", 0),
        ("42.0", "42", 0),
        ("Paris, France", "Paris", 0),
        ("", "x", 0),
        ("new  york\n", "New York", 1),
    ],
)
def test_exact(answer, right, score):
    assert scored("exact", answer, right) == score


def test_aliases_count():
    assert scored("exact", "NYC", "New York", {"aliases": ["nyc"]}) == 1
    assert scored("numeric", "0.5", "1/3", {"aliases": ["1/2"]}) == 1


@pytest.mark.parametrize(
    "text, number",
    [
        ("42", 42),
        ("The answer is 1,234,567.5 dollars.", 1234567.5),
        ("$3,000 and then €12", 12),
        ("-$5", -5),
        ("−7 °C", -7),
        ("3/4 of it", 0.75),
        ("1.5e3 m", 1500),
        ("1e-05", 1e-5),
        ("1,2,3", 3),
        ("we get \\boxed{\\frac{3}{8}}, as 5 > 2", 0.375),
        ("\\boxed{1{,}000} is \\boxed{12}", 12),
        ("50%", 50),
        (".5", 0.5),
        ("step2 gives x7", None),
        ("no number", None),
        ("1/0", None),
        ("9" * 400, None),
        ("12 apples (not 10 apples)", 10),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert number_in(text) == number


def test_numeric_tolerance_is_relative():
    assert scored("numeric", "1000.0005", "1000") == 1
    assert scored("numeric", "1000.01", "1000") == 0
    assert scored("numeric", "1000.01", "1000", tolerance=1e-4) == 1
    assert scored("numeric", "0.0000001", "0") == 1 and scored("numeric", "0.001", "0") == 0
    assert scored("numeric", "none of them", "7") == 0
    with pytest.raises(ValueError, match="question's answer 'seven' has no number"):
        scored("numeric", "7", "seven")


@pytest.mark.parametrize(
    "answer, right, score",
    [
        ("$\\frac{1}{2}$", "0.5", 1),
        ("The answer is $(x+1)^2$.", "x^2 + 2x + 1", 1),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1),
        ("41", "42", 0),
        ("$x$", "$y$", 0),
        ("", "1", 0),
    ],
)
def test_math_verify(answer, right, score):
    pytest.importorskip("math_verify", reason="math_verify is not installed: flowkern[math]")
    assert scored("math_verify", answer, right) == score


def test_math_verify_needs_the_main_thread():
    pytest.importorskip("math_verify", reason="math_verify is not installed: flowkern[math]")
    raised = []

    def elsewhere():
        try:
            scored("math_verify", "1", "1")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert raised == ["math_verify: must be called in the main thread, whose signals it uses"]


@pytest.mark.parametrize(
    "said, verdict",
    [
        ("They agree.\nVerdict: True", True),
        ("**Verdict:** `False`", False),
        ("### Verdict\n", None),
        ("- *verdict*: **TRUE**.", True),
        ('```json\n{"analysis": "same", "true_false": true}\n```', True),
        ('{"analysis": "it is true that", "true_false": "False"}', False),
        ("It could be Verdict: True, but no.\nVerdict: False", False),
        ("True", True),
        ("> **False.**", False),
        ("True\nFalse", None),
        ("That is true, isn't it?", None),
        ("Verdict: untrue", None),
        ("", None),
    ],
)
def test_a_verdict_survives_markdown(said, verdict):
    assert verdict_in(said) is verdict


def test_a_judge_is_asked_with_the_texts_as_they_are():
    question = Query("{answer} {0} {{x}} %s \\1", "{question}", 0, {"aliases": ["{right}"]})
    asked = judged("the {right} one {unknown}", question)
    assert "<question>\n{answer} {0} {{x}} %s \\1\n</question>" in asked
    assert "<right>\n{question}\nor\n{right}\n</right>" in asked
    assert "<answer>\nthe {right} one {unknown}\n</answer>" in asked


def client_of(*texts):
    said = list(texts)

    async def client(messages, **settings):
        client.calls.append(settings)
        return said.pop(0)

    client.calls = []
    return client


def test_judge():
    assert scored("judge", "six", "6", client=client_of("Verdict: True")) == 1
    again = client_of("hm", "**Verdict**: False")
    assert scored("judge", "7", "6", client=again) == 0 and again.calls == [{}, {"seed": 1}]
    silent = client_of()
    assert scored("judge", " \n", "6", client=silent) == 0 and silent.calls == []
    with pytest.raises(Exception, match="the judge said neither True nor False: 'hm'"):
        scored("judge", "7", "6", client=client_of("hm", "hm"), attempts=2)


class Longer:
    def __init__(self, least: int):
        self.least = least

    def __call__(self, answer, query):
        return float(len(answer) >= self.least)


def test_a_reward_of_ones_own():
    assert scored(f"{__name__}:Longer", "abc", "", least=3) == 1


@pytest.mark.parametrize(
    "kind, name, options, said",
    [
        ("exakt", None, {}, "reward.exakt: got 'exakt', .*did you mean 'exact'"),
        ("exakt", "mine", {}, "reward.mine.kind: got 'exakt'"),
        ("exact", None, {"x": 1}, "reward.exact.x: unknown key"),
        ("numeric", None, {"tolerance": -1}, "reward.numeric.tolerance: got -1"),
        ("judge", None, {}, "reward.judge.base_url: missing"),
        ("judge", None, {"client": 1, "attempts": 0}, "reward.judge.attempts: got 0"),
        (f"{__name__}:Longer", "own", {}, "reward.own.least: missing"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused_by_its_key(kind, name, options, said):
    with pytest.raises(ConfigError, match=said):
        load_answer(kind, name, **options)


def test_an_unknown_reward_is_refused_without_an_import():
    require_answer("judge")
    with pytest.raises(ConfigError, match="reward.jugde"):
        require_answer("jugde")
