"""The calculator and the search: what they answer, and what they refuse in no time."""

import asyncio
import json
import re
import time

import pytest

from flowkern.agent.tools import ToolFailure, load_tool
from flowkern.agent.tools.calculator import calculate
from flowkern.checks import ConfigError


@pytest.mark.parametrize(
    "expression, value",
    [
        ("2 + 2 * 3", "8"),
        ("7 / 2", "3.5"),
        ("6 / 3", "2"),
        ("0.1 + 0.2", "0.3"),
        ("-2 ** 2", "-4"),
        ("2 ** -2", "0.25"),
        ("1,234,567 + 1", "1234568"),
        ("max(1,234)", "234"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("17 // 5 + 17 % 5", "5"),
        ("sqrt(2)", "1.4142135623731"),
        ("factorial(20) / comb(20, 3)", "2134124568576000"),
        ("round(2.5) + round(3.14159, 2)", "5.14"),
        ("1 ** (10 ** 300)", "1"),
        ("2 ** 4000 - 2 ** 4000", "0"),
        ("cos(pi)", "-1"),
    ],
)
def test_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression, said",
    [
        ("9**9**9", "the result is too large"),
        ("9**9**9**9", "the result is too large"),
        ("(-7) ** 99999999999", "the result is too large"),
        ("10**300 * 10.0**300", "the result is no real number"),
        ("1e400", "the result is no real number"),
        ("2.5 ** 10**9", "the result is too large"),
        ("*".join(["(2**4000)"] * 50), "the result is too large"),
        ("factorial(10**9)", "factorial takes"),
        ("factorial(factorial(5))", None),
        ("comb(10**9, 5*10**8)", "comb takes"),
        ("round(1.5, 10**30)", None),
        ("gcd(2**4000, 3**2500)", None),
        ("9" * 999, None),
        ("9" * 1001, "more than 1,000 characters"),
        ("(" * 400 + "1" + ")" * 400, "no arithmetic"),
        ("-" * 900 + "1", "parts"),
        ("+".join("1" * 400), "parts"),
        ("1 / 0", "division by zero"),
        ("(-8) ** .5", "no real number"),
        ("sqrt(-1)", "math domain error|expected a nonnegative"),
        ("2 ^ 3", "a power is \\*\\*"),
        ("__import__('os')", "__import__ is not known"),
        ("().__class__", "Attribute is no arithmetic"),
        ("[1 for x in range(9**9)]", "ListComp is no arithmetic"),
        ("'a' * 9**9", "no arithmetic"),
        ("lambda: 1", "Lambda is no arithmetic"),
        ("True + 1", "Constant is no arithmetic"),
        ("abs(1, 2)", "abs"),
        ("x + 1", "x is not known"),
        ("", "no arithmetic"),
        ("2 +", "no arithmetic"),
        ("\0", "no arithmetic"),
        ("min()", "min"),
    ],
)
def test_calculator_is_over_at_once(expression, said):
    begun = time.thread_time()
    try:
        assert calculate(expression) and said is None
    except ToolFailure as failure:
        assert said is not None

        assert re.search(said, str(failure)), failure
    assert time.thread_time() - begun < 0.5, "some thousandths"


TABLE = [
    f"The price of {item} is {n}; its weight {n + 40}."
    for n, item in enumerate("tea salt rice oil".split(), 2)
]


def searched(passages, query, **options):
    pytest.importorskip("bm25s", reason="bm25s is not installed: flowkern[agent]")
    made = load_tool("search", passages=passages, **options)
    return asyncio.run(made(query=query))


def test_search_finds_the_passage(tmp_path):
    assert searched(TABLE, "what is the price of rice?", top=1).text == TABLE[2]
    assert searched(TABLE, "oil salt").text.splitlines() == [f"- {TABLE[1]}", f"- {TABLE[3]}"]
    assert searched(TABLE, "caviar").failure == "nothing was found for 'caviar'"
    assert searched(TABLE, "").failure
    path = tmp_path / "table.jsonl"
    rows = [{"title": "Tea", "text": "a drink"}, "a drink of water", {"text": "bread"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert searched(str(path), "tea drink", top=1).text == "Tea: a drink"


def test_search_gives_equal_passages_in_their_order():
    """A rollout's result is the same wherever it is made."""
    twins = [f"a green apple, number {n}" for n in range(40)]
    assert searched(twins, "green apple", top=5).text == "\n".join(f"- {one}" for one in twins[:5])


@pytest.mark.parametrize(
    "passages, options, said",
    [
        ([], {}, "agent.tools.search.passages: got 0, expected from 1"),
        ([3], {}, "agent.tools.search.passages: row 1: got 3, expected a string"),
        (["the of"], {}, "agent.tools.search.passages: none of them has a word"),
        (
            ["a tea"],
            {"top": 0},
            "agent.tools.search.top: got 0, expected a whole number from 1 to 100",
        ),
        ("absent.jsonl", {}, "agent.tools.search.passages: absent.jsonl cannot be read"),
    ],
)
def test_search_refuses_what_is_no_corpus(passages, options, said):
    pytest.importorskip("bm25s", reason="bm25s is not installed: flowkern[agent]")
    with pytest.raises(ConfigError, match=said):
        load_tool("search", passages=passages, **options)


def test_search_names_the_line_that_is_no_passage(tmp_path):
    pytest.importorskip("bm25s", reason="bm25s is not installed: flowkern[agent]")
    path = tmp_path / "bad.jsonl"
    path.write_text('"fine"\n\n{"title": "no text"}\n')
    with pytest.raises(ConfigError, match="bad.jsonl, line 3: got {'title': 'no text'}, expected"):
        load_tool("search", passages=str(path))
