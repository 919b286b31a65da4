"""A recipe's plan, and what tests ask of it."""

from flowkern.rl.algorithms import recipe
from flowkern.schedules import sd3_sigmas


def plan_of(name, iteration=0, seed=0, grid=sd3_sigmas, **options):
    return recipe(name)(**options).plan(grid, iteration, seed)


def drawn_steps(plan):
    """(member, step) of the drawn edges, and of those that are trained."""
    drawn = [n for n in plan.nodes if n.parent >= 0 and n.member is not None]
    key = lambda node: (node.member, node.depth - 1)  # noqa: E731
    return {key(n) for n in drawn}, {key(n) for n in drawn if n.is_trained}


def path(plan, leaf):
    """The noise levels from the root to a leaf."""
    node, levels = next(n for n, position in plan.leaves.items() if position == leaf), []
    while node >= 0:
        levels.append(plan.nodes[node].sigma)
        node = plan.nodes[node].parent
    return levels[::-1]


def std(node):
    return float(node.edge.std)
