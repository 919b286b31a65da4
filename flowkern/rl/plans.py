"""The plans of a recipe's rollout, looked at, and what a prompt of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from flowkern import rollout
from flowkern.checks import ConfigError
from flowkern.rl.recipe import Grid, Recipe

_OPTIONS = {
    "kind": "sde_type", "is_trained": "sde_type", "needs_std": "sde_type", "order": "solver_order",
}  # fmt: skip
"""What a plan calls it -> the option that it comes from."""


def plans_of(
    recipe: Recipe, grid: Grid, iteration: int = 0, seed: int = 0
) -> Sequence[rollout.Plan]:
    """Its plans. Raises ConfigError, naming the key, for options that nothing can be drawn with."""
    try:
        plans = recipe.plans(grid, iteration, seed)
        rollout.require_one_form(plans)
        return plans
    except ValueError as error:
        name, colon, reason = str(error).partition(":")
        option = _OPTIONS.get(name, name)
        if option not in {field.name for field in fields(recipe)}:
            raise ConfigError(f"algorithm: {error}") from error
        raise ConfigError(f"algorithm.{option}{colon}{reason}") from error


def cost_of(plans: Sequence[rollout.Plan]) -> rollout.Cost:
    """Of a prompt, where each has its plan: the mean."""
    distinct = {id(plan): plan for plan in plans}
    costs = {key: plan.cost() for key, plan in distinct.items()}
    return rollout.Cost.mean([costs[id(plan)] for plan in plans])
