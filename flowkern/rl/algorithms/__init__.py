"""Algorithms: one short file each, a recipe with the paper's defaults, and a row of the table."""

from __future__ import annotations

from typing import Any

from flowkern.checks import ConfigError
from flowkern.lookup import load
from flowkern.rl.cost import counts
from flowkern.rl.recipe import AnyRecipe, Recipe

__all__ = ["ALGORITHMS", "DEFAULT", "PLANNERS", "cost", "flow_recipe", "name_of", "names", "recipe"]

ALGORITHMS = {
    "awm": "flowkern.rl.algorithms.awm:AWM",
    "branch_grpo": "flowkern.rl.algorithms.branch_grpo:BranchGRPO",
    "crd": "flowkern.rl.algorithms.crd:CRD",
    "dance_grpo": "flowkern.rl.algorithms.dance_grpo:DanceGRPO",
    "dense_grpo": "flowkern.rl.algorithms.dense_grpo:DenseGRPO",
    "dgpo": "flowkern.rl.algorithms.dgpo:DGPO",
    "diffusion_nft": "flowkern.rl.algorithms.diffusion_nft:DiffusionNFT",
    "diffusion_opd": "flowkern.rl.algorithms.diffusion_opd:DiffusionOPD",
    "flash_grpo": "flowkern.rl.algorithms.flash_grpo:FlashGRPO",
    "flow_dppo": "flowkern.rl.algorithms.flow_dppo:FlowDPPO",
    "flow_grpo": "flowkern.rl.algorithms.flow_grpo:FlowGRPO",
    "flow_grpo_fast": "flowkern.rl.algorithms.flow_grpo_fast:FlowGRPOFast",
    "g2rpo": "flowkern.rl.algorithms.g2rpo:G2RPO",
    "gardo": "flowkern.rl.algorithms.gardo:GARDO",
    "grpo_guard": "flowkern.rl.algorithms.grpo_guard:GRPOGuard",
    "mixgrpo": "flowkern.rl.algorithms.mixgrpo:MixGRPO",
    "mixgrpo_flash": "flowkern.rl.algorithms.mixgrpo_flash:MixGRPOFlash",
    "mixgrpo_flash_star": "flowkern.rl.algorithms.mixgrpo_flash_star:MixGRPOFlashStar",
    "pref_grpo": "flowkern.rl.algorithms.pref_grpo:PrefGRPO",
    "tempflow_grpo": "flowkern.rl.algorithms.tempflow_grpo:TempFlowGRPO",
    "tree_rpo": "flowkern.rl.algorithms.tree_rpo:TreeRPO",
}
"""The recipe of each, of flow-matching models; imported when it is asked for."""

PLANNERS = {
    "agentflow": "flowkern.rl.algorithms.agentflow:AgentFlow",
    "agentflow_verl": "flowkern.rl.algorithms.agentflow_verl:AgentFlowVerl",
}
"""Those of an agent's planner."""

DEFAULT = "flow_grpo"
"""The one that the others are compared with: what a demonstration runs."""


def names() -> list[str]:
    """The algorithms of flow-matching models."""
    return sorted(ALGORITHMS)


def recipe(name: str) -> type[AnyRecipe]:
    """The recipe class of an algorithm; its fields are the options, their defaults the paper's.

    name: one of `names()`, of PLANNERS, or "module:Class" of your own.
    Raises ConfigError, a ValueError, for what is neither.
    """
    kind = load(name, ALGORITHMS | PLANNERS, "algorithm.name")
    if not (isinstance(kind, type) and issubclass(kind, AnyRecipe)):
        raise ConfigError(f"algorithm.name: got {name!r}, expected a class derived from Recipe")
    return kind


def flow_recipe(name: str) -> type[Recipe]:
    """The same, of what can be counted in network calls per prompt. Raises ConfigError for an
    algorithm whose rollouts follow from what is said in them."""
    kind = recipe(name)
    if not issubclass(kind, Recipe):
        raise ConfigError(
            f"{name}: is not counted: how many calls a question takes depends on the turns of its "
            "planner; a run's metrics.jsonl has nfe/sample, turns/mean and tokens/response"
        )
    return kind


def name_of(recipe: AnyRecipe) -> str:
    """The name that `recipe` finds it by."""
    home = f"{type(recipe).__module__}:{type(recipe).__qualname__}"
    known = ALGORITHMS | PLANNERS
    return next((name for name, place in known.items() if place == home), home)


def cost(name: str, window_start: int | None = None, **overrides: Any) -> dict[str, float]:
    """Network calls per prompt of an algorithm at its paper's defaults, guidance not counted.

    window_start: where its window begins; None: where it begins in the first rollout. overrides:
    fields of its recipe.
    Returns sample, train (calls of the trained network), decode (images), and naive_sample,
    naive_train, which the authors' released loop takes.
    """
    return counts(flow_recipe(name)(**overrides), window_start)
