"""What the rewards have in common that ask a server in its own words: a detector, a judge. Servers
that speak flowkern's own protocol are `kind: remote`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from flowkern.checks import ConfigError, finite_number, whole_number
from flowkern.rewards import Unscored
from flowkern.rewards.http import Http
from flowkern.web import token

__all__ = ["ask_all", "server", "understanding"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def server(
    url: str, token_env: str | None, retries: int, request_timeout: float | None, **options: object
) -> Http:
    """The server, and the patience with it, as options say it: token_env names the environment
    variable of the token; request_timeout: seconds of a request, its retries included.

    Raises ValueError that begins with the option.
    """
    whole_number("retries", retries, 0)
    if request_timeout is not None:
        finite_number("request_timeout", request_timeout, "seconds above 0", lambda s: s > 0)
    try:
        secret = token(token_env, "token_env")
        return Http(url, secret, timeout=request_timeout, retries=retries, **options)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def ask_all(
    ask: Callable[[Item], Answer], items: Iterable[Item], concurrency: int
) -> list[Answer | None]:
    """`ask` of every item, so many at a time; None where it raises Unscored.

    Raises Unscored where no item has an answer, for the reason of the first; what else `ask` raises
    ends all, without waiting for what is still asked.
    """
    pool = ThreadPoolExecutor(concurrency)
    try:
        asked = [pool.submit(ask, item) for item in items]
        answers, reasons = [], []
        for one in asked:
            try:
                answers.append(one.result())
            except Unscored as error:
                answers.append(None)
                reasons.append(error)
        if reasons and len(reasons) == len(answers):
            raise reasons[0]
        return answers
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def understanding(answer_of: Http, kind: str) -> Iterator[None]:
    """Around the reading of an answer: what is not as docs/rewards.md has it is Unscored, naming
    the server. kind: what the server is, as the page calls it.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unscored(
            f"{answer_of.url}: the answer is not what docs/rewards.md asks of {kind} ({what:.200})"
        ) from error
