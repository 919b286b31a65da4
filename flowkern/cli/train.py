"""flowkern train: from a configuration."""

from __future__ import annotations

import argparse
import re
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowkern.train.config import Config

OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w:-]+)*=")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "train",
        parents=[common],
        help="train from a configuration",
        allow_abbrev=False,
        description="Train from a configuration. Ctrl-C saves the last finished step and exits; a "
        "second Ctrl-C exits at once.",
        epilog="Several processes: torchrun --standalone --nproc_per_node N scripts/train.py "
        "CONFIG.yaml, with ACCELERATE_USE_CPU=true where there is no GPU.",
    )
    parser.add_argument(
        "arguments",
        metavar="CONFIG.yaml [MORE.yaml ...] [key.path=value ...]",
        nargs="*",
        help="see configs/; files are merged from the first to the last (reward: replaced), then "
        "single keys are set, key.path=value or --key.path value, e.g. train.learning_rate=1e-3, "
        "train.resume_from_checkpoint=latest",
    )
    parser.set_defaults(command=run, fail=parser.error)


def run(options: argparse.Namespace) -> int:
    from flowkern.train.config import load_config

    files = [text for text in options.arguments if not OVERRIDE.match(text)]
    overrides = [text for text in options.arguments if OVERRIDE.match(text)]
    if not files:
        options.fail("train: expected a CONFIG.yaml, as in configs/")
    config = load_config(files, overrides)  # what is wrong there shows before the imports
    return start(config)


def start(config: Config) -> int:
    """Train; returns the exit status."""
    from flowkern.train.loop import Loop
    from flowkern.train.quiet import quiet

    quiet()
    status = Loop(config).run()
    if status:  # stopped by a signal, and all is saved: another Ctrl-C ends what Python still does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status
