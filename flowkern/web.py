"""What is the same of every call over HTTP: an address, a token, how long a server asks to wait."""

from __future__ import annotations

import datetime
import email.utils
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from flowkern.checks import ConfigError


def line(text: str, most: int = 300) -> str:
    """What a message has room for of a text that another wrote."""
    words = " ".join(text[: 4 * most].split())
    return words if len(words) <= most else f"{words[: most - 3]}..."


def token(name: str | None, key: str) -> str | None:
    """The secret in the environment variable `name`; None: none is asked for.

    Raises ConfigError naming `key` where the variable is not set.
    """
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{key}: the environment variable {name} is not set")
    return value


def bearer(secret: str | None) -> dict[str, str]:
    return {} if secret is None else {"authorization": f"Bearer {secret}"}


def checked_url(url: Any, key: str) -> str:
    """An http or https address without a slash at its end; raises ConfigError naming `key`."""
    try:
        parsed = urlsplit(url)
        is_one = parsed.scheme in ("http", "https") and bool(parsed.hostname)
        _ = parsed.port  # which is read, and refused, when asked for
    except (ValueError, TypeError, AttributeError):
        is_one = False
    if is_one and "@" in parsed.netloc:
        raise ConfigError(f"{key}: has a name or password in it; give it by token_env")
    if not is_one:
        raise ConfigError(f"{key}: got {url!r}, expected http://HOST:PORT or https://HOST")
    return str(url).rstrip("/")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, given as a number or as a date; None: it does not."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except (ValueError, TypeError):
            return None
        zone = date.tzinfo or datetime.UTC
        seconds = (date.replace(tzinfo=zone) - datetime.datetime.now(zone)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None
