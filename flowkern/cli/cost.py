"""flowkern cost: network calls per prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

ROLLOUTS = 300


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "cost",
        parents=[common],
        help="count network calls",
        description="Network calls and images per prompt, guidance not counted: of algorithms at "
        "their papers' defaults, or of a configuration. Where rollouts differ, those of the first "
        f"and the mean of {ROLLOUTS}, as many as papers' runs have (of all, in a shorter run).",
    )
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="an algorithm, or your own as module:Class (default: all that are here); with "
        "--config an override, key.path=value or --key.path value",
    )
    parser.add_argument("--config", metavar="CONFIG.yaml", help="count for this run")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from flowkern.rl.algorithms import name_of, names, recipe
    from flowkern.rl.cost import mean_cost
    from flowkern.schedules import sd3_sigmas  # any grid: calls do not depend on noise levels

    if options.config is None:
        recipes = {}
        for name in options.names or names():
            kind = recipe(name)
            recipes[name] = kind()
            recipes |= {f"{name}, {form}": kind(**more) for form, more in kind.forms.items()}
        rollouts, seed = ROLLOUTS, 0
    else:
        from flowkern.train.config import load_config

        config = load_config(options.config, options.names)
        recipes = {name_of(config.algorithm): config.algorithm}
        rollouts = min(ROLLOUTS, config.train.steps // config.algorithm.updates_per_rollout)
        seed = config.seed
    rows = [("", "sampling", "released", "saved", "training", "released", "images")]
    for name, algorithm in recipes.items():
        first, mean = (mean_cost(algorithm, sd3_sigmas, range(n), seed) for n in (1, rollouts))
        found = {name: first} | ({f"  mean of {rollouts}": mean} if mean != first else {})
        for label, (ours, theirs) in found.items():
            saved = f"{1 - ours.sample / theirs.sample:.0%}"
            counts = (ours.sample, theirs.sample, ours.train, theirs.train, ours.images)
            sampling, naive, *rest = (f"{count:.1f}".removesuffix(".0") for count in counts)
            rows.append((label, sampling, naive, saved, *rest))
    print("Network calls and images per prompt, guidance not counted. Released: the authors' loop.")
    _print_table(rows)
    return 0


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the head; the first column is text, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, *numbers in rows:
        texts = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([label.ljust(widths[0]), *texts]))
