"""What a recipe costs: network calls and images."""

from __future__ import annotations

from flowkern import rollout
from flowkern.rl.plans import cost_of, plans_of
from flowkern.rl.recipe import Grid, Recipe


def mean_cost(
    recipe: Recipe, grid: Grid, iterations: range = range(1), seed: int = 0
) -> tuple[rollout.Cost, rollout.Cost]:
    """What this package takes and what the released loop takes, per prompt, guidance not counted.

    Means over the rollouts `iterations`, whose plans may differ.
    """
    ours = [cost_of(plans_of(recipe, grid, i, seed)) for i in iterations]
    theirs = [recipe.released(i, seed) for i in iterations]
    return rollout.Cost.mean(ours), rollout.Cost.mean(theirs)


def counts(recipe: Recipe, window_start: int | None = None) -> dict[str, float]:
    """Per prompt of one rollout, guidance not counted: the first, or the first whose window begins
    at step `window_start`.

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


def network_calls(
    recipe: Recipe, cost: rollout.Cost, iteration: int = 0
) -> tuple[float, list[float]]:
    """All calls of the network for a rollout of all prompts, those of guidance, of a reference and
    of copies included, as nfe/sample and nfe/train count them: in sampling, and in each update.

    cost: of a prompt of that rollout. Training takes fewer calls where rewards are all alike.
    """
    guidance = recipe.guidance(uncond=0)
    objective, updates = recipe.objective_at(uncond=0), recipe.updates_per_rollout
    prompts = recipe.prompts_per_rollout
    # At the first update copies are the weights where they have just been made so, or all begin.
    moving = {n: decay for n, decay in recipe.copies.items() if n not in recipe.read_from}
    current = [n for n, decay in moving.items() if not iteration or not decay(iteration)]
    first = objective.calls(is_on_policy=recipe.sampler is None, current=current)
    calls = [first, *[objective.calls()] * (updates - 1)]
    halves = 1 if guidance is None else 2
    return prompts * halves * cost.sample, [prompts / updates * cost.train * c for c in calls]


def released_calls(recipe: Recipe, iteration: int = 0, seed: int = 0) -> tuple[int, int]:
    """The same of the authors' loop: in sampling, in training."""
    cost, guidance = recipe.released(iteration, seed), recipe.guidance(uncond=0)
    prompts, halves = recipe.prompts_per_rollout, 1 if guidance is None else 2
    calls = recipe.objective_at(uncond=0).calls()
    return round(prompts * halves * cost.sample), round(prompts * calls * cost.train)
