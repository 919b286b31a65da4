"""The digits run that comes with the package: what it trains on, and its configurations.

A wheel carries them in `flowkern/demo_data` (setup.py); a checkout has them at its root.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from flowkern.checks import ConfigError
from flowkern.rl.algorithms import DEFAULT

PACKAGE = Path(__file__).resolve().parent


def data() -> Path:
    """The folder of `assets` and `configs`."""
    packaged = PACKAGE / "demo_data"
    return packaged if packaged.is_dir() else PACKAGE.parent


def run(overrides: Sequence[str], name: str | None = None) -> int:
    """Train the digits demo into the working directory; returns the exit status of a training."""
    from flowkern.train.config import load_config

    assets = {
        "model.path": "digits-sd3",
        "data.train_prompts": "digits-prompts/train.jsonl",
        "data.test_prompts": "digits-prompts/test.jsonl",
    }
    # Quoted: a path may hold what YAML reads as something else.
    places = [f"{key}={json.dumps(str(data() / 'assets' / name))}" for key, name in assets.items()]
    folder = data() / "configs" / "digits"
    chosen = folder / f"{name or DEFAULT}.yaml"
    if not chosen.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"--algorithm: got {name!r}, expected one of {known}")
    config = load_config(chosen, [*places, *overrides])  # refused before the imports
    from flowkern.train.loop import Loop

    return Loop(config).run()
