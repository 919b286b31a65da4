"""A number out of what a language model answered, or none: never 0 for an answer that says nothing.

Released readers of the same answers take "Final Score: 10" for 1, overlook `**Final Score:** 4`,
and score 0 what they cannot read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

__all__ = ["expected_value", "stated_score"]

MARKS = r"[\s*_`\[]*+"
"""Of markdown, between a label and its number. Never given back, nor is a bracket longer than a
scale's: else a long answer without a number takes minutes."""


def stated_score(text: str, labels: Sequence[str], low: float, high: float) -> float:
    """The number that stands last behind a label, as in ``**Final Score** (1-5): **3.5**``, in
    capitals or not; of several labels the mean, without those that say N/A.

    NaN where a label is missing, or says what is not within low to high, or is a share of another
    whole than `high` (4/10).
    """
    found = []
    for label in labels:
        stated = _pattern(label).findall(text)
        if not stated:
            return math.nan
        number, whole = stated[-1]
        if not number:
            continue
        if not low <= float(number) <= high or (whole and float(whole) != high):
            return math.nan
        found.append(float(number))
    return sum(found) / len(found) if found else math.nan


@cache
def _pattern(label: str) -> re.Pattern[str]:
    """Of ("3.5", "5" of a "/5" or ""), or ("", "") for N/A."""
    words = r"\s+".join(map(re.escape, label.split()))
    number = rf"([-+]?[0-9]+(?:\.[0-9]+)?)(?![\w]|\.[0-9])(?:{MARKS}/{MARKS}([0-9]+))?"
    between = rf"{MARKS}(?:\([^)]{{0,100}}+\))?{MARKS}[:=]?{MARKS}"
    return re.compile(rf"(?<![^\W_]){words}{between}(?:{number}|N/?A\b)", re.IGNORECASE)


def expected_value(
    top: Iterable[tuple[str, float]], values: Mapping[str, float], least: float = 0.5
) -> float:
    """The mean of `values` under the probabilities of the tokens that name them.

    top: (token, log-probability) of the likeliest tokens in one place; spaces around and capitals
    do not count, so " Yes" and "yes" are one. NaN where the tokens of `values` have less than
    `least` of the probability: then the model is about to say something else.
    """
    total = mass = 0.0
    for token, log_probability in top:
        value = values.get(token.strip().lower())
        if value is not None and log_probability == log_probability:
            probability = math.exp(min(log_probability, 0.0))  # -9999: none, as some servers say
            total += value * probability
            mass += probability
    return total / mass if mass >= max(least, 1e-12) else math.nan
