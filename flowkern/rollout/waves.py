"""A plan laid out for batches: the nodes of one depth are a wave, ready together.

W nodes of a wave, of which something leaves the first I; C edges of one launch; P prompts. A row is
a node of one prompt: row = position in the wave * P + prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowkern.rollout.plan import Node, Plan
from flowkern.schedules import Coefficients, edge_coefficients


@dataclass(frozen=True)
class Launch:
    """Edges of a wave that one call of the step kernel serves."""

    parent: Tensor
    """(C,): positions in the wave."""
    child: Tensor
    """(C,): positions in the next wave."""
    table: Coefficients
    """(C,) rows."""
    member: Tensor | None
    """(C,): whose noise; None: deterministic."""
    history: tuple[Tensor, ...]
    """(C,) each: places among the clean predictions of the wave before, of the one before it."""

    def within(self, part: slice, prompts: int) -> tuple[Tensor, Tensor, Tensor]:
        """The edges that leave rows `part`: which (B,), which prompt (B,), and which row of the
        part they leave (B,).
        """
        row = self.parent[:, None] * prompts + torch.arange(prompts)
        edge, prompt = ((row >= part.start) & (row < part.stop)).nonzero(as_tuple=True)
        return edge, prompt, row[edge, prompt] - part.start


@dataclass(frozen=True)
class Wave:
    """The nodes of one depth."""

    nodes: tuple[int, ...]
    """(W,): those that something leaves come first."""
    depth: int
    sigma: Tensor
    """(I,) float64."""
    to_clean: Coefficients
    """(I,) rows: the Euler edges to sigma 0, whose ends are the clean predictions."""
    origin: Tensor
    """(I,): places among the plan's origins, -1 elsewhere."""
    memory: Tensor
    """(I,): places among the clean predictions that later steps need, -1 elsewhere."""
    launches: tuple[Launch, ...]


def waves(plan: Plan) -> list[Wave]:
    """The waves of a plan, from the roots on."""
    nodes = plan.nodes
    inner = {node.parent for node in nodes}
    by_depth: list[list[int]] = [[] for _ in range(1 + max(node.depth for node in nodes))]
    for i, node in enumerate(nodes):
        by_depth[node.depth].append(i)
    for wave in by_depth:
        wave.sort(key=lambda i: i not in inner)  # stable
    place = {i: position for wave in by_depth for position, i in enumerate(wave)}
    memory = _remembered(nodes)
    origin = {node: i for i, node in enumerate(plan.origins)}
    out = []
    for depth, wave in enumerate(by_depth):
        live = [i for i in wave if i in inner]
        sigma = torch.tensor([nodes[i].sigma for i in live], dtype=torch.float64)
        children = by_depth[depth + 1] if live else []
        out.append(
            Wave(
                tuple(wave),
                depth,
                sigma,
                edge_coefficients(sigma, torch.zeros_like(sigma), "ode", 0.0),
                torch.tensor([origin.get(i, -1) for i in live]),
                torch.tensor([memory.get(i, -1) for i in live]),
                _launches(nodes, children, place, memory),
            )
        )
    return out


def _remembered(nodes: list[Node]) -> dict[int, int]:
    """The nodes whose clean predictions are history of a later step, and their places in their
    wave's.
    """
    needed = set()
    for node in nodes:
        ancestor = node.parent
        for _ in range(node.edge.num_history if node.edge is not None else 0):
            ancestor = nodes[ancestor].parent
            needed.add(ancestor)
    count: dict[int, int] = {}
    places = {}
    for i in sorted(needed):
        places[i] = count.setdefault(nodes[i].depth, 0)
        count[nodes[i].depth] += 1
    return places


def _launches(nodes, children, place, memory) -> tuple[Launch, ...]:
    """The edges to `children`, by what the kernel is called with."""
    alike: dict[tuple[bool, int], list[int]] = {}
    for i in children:
        alike.setdefault((nodes[i].member is not None, nodes[i].edge.num_history), []).append(i)
    out = []
    for (is_noisy, length), ends in alike.items():
        ends.sort(key=lambda i: place[nodes[i].parent])
        parents = ancestors = [nodes[i].parent for i in ends]
        history = []
        for _ in range(length):
            ancestors = [nodes[i].parent for i in ancestors]
            history.append(torch.tensor([memory[i] for i in ancestors]))
        out.append(
            Launch(
                torch.tensor([place[i] for i in parents]),
                torch.tensor([place[i] for i in ends]),
                Coefficients(torch.stack([nodes[i].edge.table for i in ends]), length),
                torch.tensor([nodes[i].member for i in ends]) if is_noisy else None,
                tuple(history),
            )
        )
    return tuple(out)
