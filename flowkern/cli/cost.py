"""flowkern cost: network calls per prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowkern.checks import ConfigError

if TYPE_CHECKING:
    from flowkern.rl.recipe import Recipe

ROLLOUTS = 300


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "cost",
        parents=[common],
        help="count network calls",
        description="Network calls and images per prompt, of algorithms at their papers' defaults "
        "or of a configuration: guidance not counted, and all of them as a run counts them. Where "
        f"rollouts differ, those of the first and the mean of {ROLLOUTS}, as many as papers' runs "
        "have (of all, in a shorter run).",
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
    from flowkern.rl.algorithms import flow_recipe, name_of, names

    if options.config is None:
        recipes = {}
        for name in options.names or names():
            kind = flow_recipe(name)
            try:
                recipes[name] = kind()
            except TypeError as error:  # one of one's own
                raise ConfigError(f"{name}: has no defaults to count with: {error}") from error
            recipes |= {f"{name}, {form}": kind(**more) for form, more in kind.forms.items()}
        rollouts, seed = ROLLOUTS, 0
    else:
        from flowkern.train.config import load_config

        config = load_config(options.config, options.names)
        flow_recipe(name_of(config.algorithm))  # refuses what cannot be counted
        recipes = {name_of(config.algorithm): config.algorithm}
        rollouts = min(ROLLOUTS, config.train.steps // config.algorithm.updates_per_rollout)
        seed = config.seed

    from flowkern.rl.cost import network_calls  # what is refused shows before the imports
    from flowkern.rl.plans import cost_of, plans_of
    from flowkern.rollout import Cost
    from flowkern.schedules import sd3_sigmas  # any grid: calls do not depend on noise levels

    def row(algorithm: Recipe, costs: Sequence[Cost]) -> tuple[str, ...]:
        ours = Cost.mean(costs)
        theirs = Cost.mean([algorithm.released(i, seed) for i in range(len(costs))])
        found = [network_calls(algorithm, cost, i) for i, cost in enumerate(costs)]
        total = len(costs) * algorithm.prompts_per_rollout
        calls = sum(s for s, _ in found) / total, sum(sum(t) for _, t in found) / total
        counts = (ours.sample, theirs.sample, ours.train, theirs.train, *calls, ours.images)
        sampling, naive, *rest = (f"{count:.1f}".removesuffix(".0") for count in counts)
        return sampling, naive, f"{1 - ours.sample / theirs.sample:.0%}", *rest

    head = "sampling released saved training released nfe/sample nfe/train images"
    rows = [("", *head.split())]
    for name, algorithm in recipes.items():
        costs = [cost_of(plans_of(algorithm, sd3_sigmas, i, seed)) for i in range(rollouts)]
        first, mean = row(algorithm, costs[:1]), row(algorithm, costs)
        rows += [(name, *first)] + ([(f"  mean of {rollouts}", *mean)] if mean != first else [])
    print("Network calls and images per prompt, guidance not counted. Released: the authors' loop.")
    print(
        "nfe: all calls, those of guidance, of a reference and of copies of the weights included."
    )
    _print_table(rows)
    return 0


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the head; the first column is text, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, *numbers in rows:
        texts = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([label.ljust(widths[0]), *texts]))
