"""What a recipe costs: network calls and images per prompt, guidance not counted."""

from __future__ import annotations

from flowkern import rollout
from flowkern.rl.recipe import Grid, Recipe


def mean_cost(
    recipe: Recipe, grid: Grid, iterations: range = range(1), seed: int = 0
) -> tuple[rollout.Cost, rollout.Cost]:
    """What this package takes and what the released loop takes, per prompt.

    Means over the rollouts `iterations`, whose plans may differ.
    """
    ours = [recipe.plan(grid, i, seed).cost() for i in iterations]
    theirs = [recipe.released(i, seed) for i in iterations]
    return rollout.Cost.mean(ours), rollout.Cost.mean(theirs)


def counts(recipe: Recipe, window_start: int | None = None) -> dict[str, float]:
    """Of one rollout: the first, or the first whose window begins at step `window_start`.

    Returns sample, train (calls of the trained network), decode (images), and naive_sample,
    naive_train, which the authors' released loop takes.
    """
    from flowkern.schedules import sd3_sigmas  # any grid: calls do not depend on noise levels

    iteration = 0
    if window_start is not None:
        while recipe.window_start(iteration) != window_start:
            if (iteration := iteration + 1) == 10_000:
                name = type(recipe).__name__
                raise ValueError(f"window_start: got {window_start}, which {name} never reaches")
    ours, theirs = mean_cost(recipe, sd3_sigmas, range(iteration, iteration + 1))
    found = {"sample": ours.sample, "train": ours.train, "decode": ours.images}
    return found | {"naive_sample": theirs.sample, "naive_train": theirs.train}
