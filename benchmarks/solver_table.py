"""Do AWM and DiffusionNFT learn better from images that are solved better?

Each line samples its training images in another way on the demo model's grid, SD3's own, whose step
to the last noise level above 0 is long; solver_error.py says how far each way is from the truth.
"""

from __future__ import annotations

from dataclasses import replace

from causes import Experiment

from flowkern.schedules import edge_coefficients

OWN = "algorithm.last_sigma_ratio=0"
MATCHING = {"awm": "AWM", "diffusion_nft": "DiffusionNFT"}


def lower_order_final(trainer) -> None:
    """The steps to the last noise level above 0 are Euler's, too."""
    recipe, plan_of = trainer.recipe, trainer.recipe.plan

    def plan(*args):
        made = plan_of(*args)
        for leaf in made.leaves:
            last = made.nodes[leaf].parent
            node = made.nodes[last]
            edge = edge_coefficients(made.nodes[node.parent].sigma, node.sigma, "ode", 0.0)
            made.nodes[last] = replace(node, edge=edge)
        return made

    object.__setattr__(recipe, "plan", plan)


def _both(name: str, what: str, *overrides: str, **more) -> dict[str, Experiment]:
    return {
        f"{entry}_{name}": Experiment(f"{label}: {what}", entry, overrides, **more)
        for entry, label in MATCHING.items()
    }


EXPERIMENTS = {
    **_both("second", "order 2 on the model's grid", OWN),
    **_both("half", "order 2, the last level half of the one before"),
    **_both("euler", "order 1 on the model's grid", OWN, "algorithm.solver_order=1"),
    **_both("final", "order 2, the last two steps 1", OWN, change=lower_order_final),
}
