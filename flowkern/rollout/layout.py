"""A plan laid out for batches, once. For sampling the nodes of one depth are a wave, all ready; for
training the trained edges lie site by site.

W nodes of a wave, of which something leaves the first I; P prompts. A row of a wave is a node of
one prompt: row = position in the wave * P + prompt. S sites of the plan, C choices that get an
advantage (trained edges, or points to match at); of a launch, C edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkern.rollout.moves import together
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
    """Of C edges."""
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
    """Of I edges, Euler's to sigma 0, whose ends are the clean predictions."""
    origin: Tensor
    """(I,): places among the plan's origins, -1 elsewhere."""
    memory: Tensor
    """(I,): places among the clean predictions that later steps need, -1 elsewhere."""
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Edges:
    """The trained edges, which are the choices, and the sites that they leave."""

    site: Tensor
    """(C,): the site of each."""
    origins: tuple[int, ...]
    """(S,) nodes: the sites."""
    ends: tuple[int, ...]
    """(C,) nodes."""
    order: Tensor
    """(C,): the edges, site by site."""
    first: Tensor
    """(S,): where those of a site begin in `order`."""
    count: Tensor
    """(S,): how many they are."""
    sigma: Tensor
    """(S,)"""
    table: Tensor
    """(C, columns): their coefficients."""
    noise: Tensor
    """(C, 2): member and step."""
    weight: Tensor
    """(C,), of the policy term."""


@dataclass(frozen=True)
class Points:
    """Where a matching objective looks at the leaves: every point is a choice and a site."""

    site: Tensor
    """(C,): 0 to C - 1."""
    leaf: Tensor
    """(C,): positions among the leaves."""
    sigma: Tensor
    """(C,)"""
    noise: Tensor
    """(C, 2): leaf and step of the noise over it."""
    unit: Tensor
    """(C,): those of leaves that are compared, at one noise level, have one number."""


@dataclass(frozen=True)
class WaveTables:
    """What a wave's batches index, on a device."""

    sigma: Tensor
    """(I,)"""
    to_clean: Tensor
    """(I, columns)"""
    launches: tuple[tuple[Tensor, Tensor | None], ...]
    """Of each the coefficients, (C, columns), and whose noise, (C,)."""


@dataclass(frozen=True)
class Tables:
    """All that sampling and training index of a plan, on a device."""

    roots: Tensor
    """(W,): whose noise the roots are."""
    waves: tuple[WaveTables, ...]
    sigma: Tensor
    """(S,): of the sites."""
    numbers: Tensor
    """Of their noise, (C, 2)."""
    table: Tensor | None = None
    """Of `Edges`, as their weight."""
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """`Layout(plan)`: what sampling and training ask of a plan, which is whole by then.

    Raises ValueError for a plan that no rollout can use.
    """

    plan: Plan
    waves: tuple[Wave, ...] = field(init=False)
    """From the roots on."""
    trained: Edges | Points = field(init=False)
    _there: dict[Any, Tables] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.plan
        plan.check()
        trained = _points(plan) if plan.points else _edges(plan)
        vars(self).update(waves=_waves(plan), trained=trained)

    def tables(self, device: torch.device, dtype: torch.dtype) -> Tables:
        """On a device, in the dtype of coefficients; moved once, for all blocks of a rollout."""
        if (device, dtype) not in self._there:
            self._there[device, dtype] = _tables(self, device, dtype)
        return self._there[device, dtype]

    @property
    def sites(self) -> int:
        """S."""
        return len(self.trained.sigma)

    @property
    def origins(self) -> tuple[int, ...]:
        """The nodes that trained edges leave; none where points are matched."""
        return self.trained.origins if isinstance(self.trained, Edges) else ()


def _tables(layout: Layout, device: torch.device, dtype: torch.dtype) -> Tables:
    """In two copies, of numbers and of whole numbers."""
    trained, nodes = layout.trained, layout.plan.nodes
    real = [trained.sigma] + ([trained.table, trained.weight] if isinstance(trained, Edges) else [])
    whole = [torch.tensor([nodes[node].member for node in layout.waves[0].nodes])]
    whole.append(trained.noise)
    for wave in layout.waves:
        real += [wave.sigma, wave.to_clean.table, *(each.table.table for each in wave.launches)]
        whole += [each.member for each in wave.launches if each.member is not None]
    real, whole = iter(together(real, device, dtype)), iter(together(whole, device))
    own = {"sigma": next(real)}
    if isinstance(trained, Edges):
        own |= {"table": next(real), "weight": next(real)}
    own |= {"roots": next(whole), "numbers": next(whole)}
    waves = tuple(
        WaveTables(
            next(real),
            next(real),
            tuple(
                (next(real), None if each.member is None else next(whole)) for each in wave.launches
            ),
        )
        for wave in layout.waves
    )
    return Tables(waves=waves, **own)


def _points(plan: Plan) -> Points:
    leaf, sigma = zip(*plan.points, strict=True)
    sigmas = torch.tensor(sigma, dtype=torch.float64)
    number: dict[tuple[int, float], int] = {}
    unit = [number.setdefault((plan.groups[of], at), len(number)) for of, at in plan.points]
    rest = torch.tensor(plan.noises), torch.tensor(unit)
    return Points(torch.arange(len(leaf)), torch.tensor(leaf), sigmas, *rest)


def _edges(plan: Plan) -> Edges:
    origins, ends = plan.origins, plan.trained
    nodes, place = [plan.nodes[i] for i in ends], {node: i for i, node in enumerate(origins)}
    site = torch.tensor([place[node.parent] for node in nodes], dtype=torch.int64)
    count = site.bincount(minlength=len(origins))
    tables = [node.edge.table for node in nodes]
    noise = [[node.member, node.depth - 1] for node in nodes]
    return Edges(
        site,
        tuple(origins),
        tuple(ends),
        order=site.argsort(stable=True),
        first=count.cumsum(0) - count,
        count=count,
        sigma=torch.tensor([plan.nodes[i].sigma for i in origins], dtype=torch.float64),
        table=torch.stack(tables) if tables else torch.empty(0),
        noise=torch.tensor(noise, dtype=torch.int64),
        weight=torch.tensor([node.weight for node in nodes], dtype=torch.float64),
    )


def _waves(plan: Plan) -> tuple[Wave, ...]:
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
    return tuple(out)


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
