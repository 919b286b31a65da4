"""flowkern demo: the runs that come with the package, of digits and of an agent.

A wheel carries what it trains on, and its configurations, in `flowkern/demo_data` (setup.py); a
checkout has them at its root.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flowkern.checks import ConfigError
from flowkern.cli.train import start

PACKAGE = Path(__file__).resolve().parents[1]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="train on handwritten digits, or an agent's planner, in minutes on two CPU cores",
        description="Train a small pipeline on handwritten digits, or, with the word agent, the "
        "planner of an agent with two tools, into runs/ of the working directory. Both come with "
        "the package.",
    )
    parser.add_argument("--algorithm", metavar="NAME", help="see flowkern cost for the names")
    parser.add_argument(
        "overrides", metavar="agent | key.path=value", nargs="*", help="as of train"
    )
    parser.set_defaults(command=run)


def data() -> Path:
    """The folder of `assets` and `configs`."""
    packaged = PACKAGE / "demo_data"
    return packaged if packaged.is_dir() else PACKAGE.parent


def run(options: argparse.Namespace) -> int:
    """Train into the working directory; returns the exit status of a training."""
    from flowkern.train.config import load_config

    words = [one for one in options.overrides if "=" not in one]
    if words not in ([], ["agent"]):
        raise ConfigError(f"demo: got {' '.join(words)!r}, expected agent, or no word")
    if words and options.algorithm:
        raise ConfigError(f"--algorithm: got {options.algorithm!r}; the agent's demo has its own")
    chosen, assets = _of_agent() if words else _of_digits(options.algorithm)
    # Quoted: a path may hold what YAML reads as something else.
    places = [f"{key}={json.dumps(str(data() / 'assets' / part))}" for key, part in assets.items()]
    given = [one for one in options.overrides if "=" in one]
    config = load_config(chosen, [*places, *given])  # refused before the imports
    return start(config)


def _of_agent() -> tuple[Path, dict[str, str]]:
    """Its configuration, and what of it lies in assets."""
    return data() / "configs/agent/demo.yaml", {
        "model.path": "agent-demo/planner",
        "data.train_prompts": "agent-demo/train.jsonl",
        "data.test_prompts": "agent-demo/test.jsonl",
        "agent.tools.search.passages": "agent-demo/passages.jsonl",
    }


def _of_digits(algorithm: str | None) -> tuple[Path, dict[str, str]]:
    from flowkern.rl.algorithms import DEFAULT

    folder, name = data() / "configs" / "digits", algorithm or DEFAULT
    chosen = folder / f"{name}.yaml"
    if not chosen.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"--algorithm: got {name!r}, expected one of {known}")
    return chosen, {
        "model.path": "digits-sd3",
        "data.train_prompts": "digits-prompts/train.jsonl",
        "data.test_prompts": "digits-prompts/test.jsonl",
    }
