"""flowkern demo: the digits run that comes with the package.

A wheel carries what it trains on, and its configurations, in `flowkern/demo_data` (setup.py); a
checkout has them at its root.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flowkern.checks import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="train on handwritten digits, two minutes on two CPU cores",
        description="Train a small pipeline on handwritten digits, which come with the package, "
        "into runs/ of the working directory.",
    )
    parser.add_argument("--algorithm", metavar="NAME", help="see flowkern cost for the names")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="as of train")
    parser.set_defaults(command=run)


def data() -> Path:
    """The folder of `assets` and `configs`."""
    packaged = PACKAGE / "demo_data"
    return packaged if packaged.is_dir() else PACKAGE.parent


def run(options: argparse.Namespace) -> int:
    """Train into the working directory; returns the exit status of a training."""
    from flowkern.rl.algorithms import DEFAULT
    from flowkern.train.config import load_config

    assets = {
        "model.path": "digits-sd3",
        "data.train_prompts": "digits-prompts/train.jsonl",
        "data.test_prompts": "digits-prompts/test.jsonl",
    }
    # Quoted: a path may hold what YAML reads as something else.
    places = [f"{key}={json.dumps(str(data() / 'assets' / part))}" for key, part in assets.items()]
    folder = data() / "configs" / "digits"
    name = options.algorithm or DEFAULT
    chosen = folder / f"{name}.yaml"
    if not chosen.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"--algorithm: got {name!r}, expected one of {known}")
    config = load_config(chosen, [*places, *options.overrides])  # refused before the imports
    from flowkern.train.loop import Loop

    return Loop(config).run()
