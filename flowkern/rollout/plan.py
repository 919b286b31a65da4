"""The plan of a rollout: the tree of states that is sampled for every prompt, and what is trained.

A node is a latent at a noise level; it takes one network call, however many edges leave it. An edge
is an ODE step (of an order, with the history of its path) or a draw from an SDE. A recipe makes
plans on the host: one per rollout, which all prompts share, or several of one form.

N nodes, L leaves, E trained edges, S sites: the places of a tree where training calls the network,
which are the nodes that trained edges leave or, for matching objectives, the points to match at.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flowkern.schedules import (
    Coefficients,
    Sampler,
    edge_coefficients,
    multistep_coefficients,
)

MAX_NODES = 2**20  # beyond it a plan takes minutes and gigabytes, and no network follows it


@dataclass(frozen=True, slots=True)
class Node:
    """A state, and the edge that leads to it."""

    parent: int
    """The node that the edge leaves; -1: a root, drawn from noise."""
    sigma: float
    depth: int
    """Edges from the root: the Philox step of the noise that leaves this node."""
    member: int | None
    """Whose noise the state is drawn with; None: an ODE edge leads here."""
    edge: Coefficients | None = None
    is_trained: bool = False
    weight: float = 1.0
    """Of the policy term, where the edge is trained; never of a KL."""


@dataclass(frozen=True)
class Cost:
    """Network calls and images per prompt, guidance not counted."""

    sample: float
    """Calls in sampling: nodes that something leaves."""
    train: float
    """Calls in training, of the network that learns: sites."""
    images: float
    """Leaves."""

    @classmethod
    def mean(cls, costs: Sequence[Cost]) -> Cost:
        """Of the rollouts of a run."""
        return cls(*(sum(part) / len(costs) for part in zip(*map(astuple, costs), strict=True)))


class Plan:
    """A tree that is built node by node: every method returns the node it made."""

    def __init__(self, needs_std: bool = False, needs_ratio: bool = True) -> None:
        """needs_std: a KL, or a guarded ratio, is taken at the trained edges. needs_ratio: a ratio
        is; else an edge without noise may be trained."""
        self.nodes: list[Node] = []
        self.leaves: dict[int, int] = {}
        """Nodes that are decoded and rewarded -> their position, 0 to L - 1."""
        self.groups: list[int] = []
        """(L,): leaves of a prompt with the same number are compared with each other."""
        self.points: list[tuple[int, float]] = []
        """(position of a leaf, sigma), where a matching objective looks at a leaf."""
        self.noises: list[tuple[int, int]] = []
        """Of each point the leaf and the number of the point whose noise it is."""
        self.needs_std, self.needs_ratio = needs_std, needs_ratio
        self._noises: set[tuple[int, int]] = set()

    # ---- building ----

    def root(self, member: int) -> int:
        """A state of pure noise, that of `member`."""
        return self._add(Node(-1, 1.0, 0, member), noise=(member, -1))

    def step(self, node: int, sigma_next: float, order: int = 1, variant: str = "midpoint") -> int:
        """A deterministic step: Euler, or DPM-Solver++ of `order` with the history of the path.

        To sigma 0 it is the clean prediction at `node`.
        """
        path = self._path(node, order)
        edge = _ode_edge((*path, float(sigma_next)), order, variant)
        return self._add(Node(node, float(sigma_next), self.nodes[node].depth + 1, None, edge))

    def draw(
        self,
        node: int,
        sigma_next: float,
        kind: str | Sampler,
        noise_level: float,
        member: int,
        is_trained: bool = False,
        weight: float = 1.0,
    ) -> int:
        """A step of an SDE (`schedules.edge_coefficients`) with the noise of `member`."""
        origin = self.nodes[node]
        is_known = isinstance(kind, Hashable) and isinstance(noise_level, Hashable)
        edge_of = _sde_edge if is_known else _sde_edge.__wrapped__
        edge, k, std = edge_of(origin.sigma, float(sigma_next), kind, noise_level)
        if is_trained and self.needs_ratio and k == 0:
            raise ValueError(
                f"is_trained: the edge from sigma {origin.sigma} to {sigma_next} has k = 0, so its "
                "ratio is always 1"
            )
        if is_trained and self.needs_std and std == 0:
            raise ValueError(
                f"needs_std: the trained edge from sigma {origin.sigma} to {sigma_next} has "
                "std = 0, so it has no KL, and no guarded ratio"
            )
        if not math.isfinite(weight):
            raise ValueError(f"weight: expected a finite number, got {weight}, of {kind}")
        depth = origin.depth + 1
        made = Node(node, float(sigma_next), depth, member, edge, is_trained, weight)
        return self._add(made, noise=(member, origin.depth))

    def leaf(self, node: int, group: int = 0) -> int:
        """Decode and reward `node`, among the leaves of `group`; its position."""
        if self.nodes[node].sigma != 0:
            raise ValueError(f"node: a leaf is clean, got one at sigma {self.nodes[node].sigma}")
        if node in self.leaves:
            raise ValueError(f"node: {node} is a leaf already")
        self.leaves[node] = len(self.leaves)
        self.groups.append(group)
        return self.leaves[node]

    def match(self, leaf: int, sigma: float, noise_of: int | None = None) -> int:
        """Train at noise level `sigma` over the leaf at position `leaf`, with noise of its own or,
        `noise_of`, that of an earlier point; its number.
        """
        if not 0 <= leaf < len(self.leaves):
            raise ValueError(
                f"leaf: got {leaf}, expected the position of one of {len(self.leaves)}"
            )
        if not 0 < sigma <= 1:
            raise ValueError(f"sigma: expected a noise level in (0, 1], got {sigma}")
        number = len(self.points)
        if noise_of is not None and not 0 <= noise_of < number:
            raise ValueError(
                f"noise_of: got {noise_of}, expected the number of one of {number} points"
            )
        self.points.append((leaf, float(sigma)))
        self.noises.append((leaf, number) if noise_of is None else self.noises[noise_of])
        return number

    def _add(self, node: Node, noise: tuple[int, int] | None = None) -> int:
        if len(self.nodes) == MAX_NODES:
            raise ValueError(f"plan: more than {MAX_NODES} states per prompt; expected fewer steps")
        if noise in self._noises:
            raise ValueError(f"member: {noise[0]} draws noise at depth {noise[1]} already")
        if noise is not None:
            self._noises.add(noise)
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _path(self, node: int, length: int) -> tuple[float, ...]:
        """The noise levels of `node` and its ancestors, at most `length`, falling."""
        path: list[float] = []
        while node >= 0 and len(path) < length:
            path.append(self.nodes[node].sigma)
            node = self.nodes[node].parent
        return tuple(reversed(path))

    # ---- what follows from it ----

    @property
    def trained(self) -> list[int]:
        """(E,): the nodes that trained edges lead to."""
        return [i for i, node in enumerate(self.nodes) if node.is_trained]

    @property
    def origins(self) -> list[int]:
        """The nodes that trained edges leave, each once."""
        return list(dict.fromkeys(self.nodes[i].parent for i in self.trained))

    def below(self) -> Tensor:
        """(E, L) bool: which leaves each trained edge leads to."""
        edge = {node: e for e, node in enumerate(self.trained)}
        below = torch.zeros(len(edge), len(self.leaves), dtype=torch.bool)
        for node, position in self.leaves.items():
            while node >= 0:
                if node in edge:
                    below[edge[node], position] = True
                node = self.nodes[node].parent
        return below

    def cost(self) -> Cost:
        """What a prompt costs, by counting the tree."""
        sites = self.points or self.origins
        inner = {node.parent for node in self.nodes} - {-1}
        return Cost(len(inner), len(sites), len(self.leaves))

    def form(self) -> tuple[Any, ...]:
        """What all plans of a rollout agree in, whatever their noise levels and the way there:
        leaves and their groups, choices and sites, how these lie, which leaves they lead to.
        """
        origins, ends = self.origins, self.trained
        kept = sorted({*origins, *ends})
        place = {node: i for i, node in enumerate(kept)}
        site = {node: i for i, node in enumerate(origins)}
        leaves = self.below().nonzero().tolist()
        units: dict[tuple[int, float], int] = {}
        points = [
            (leaf, *noise, units.setdefault((self.groups[leaf], sigma), len(units)))
            for (leaf, sigma), noise in zip(self.points, self.noises, strict=True)
        ]
        top = min((self.nodes[i].depth for i in ends), default=0)
        edges = [(site[self.nodes[i].parent], place[i], self.nodes[i].depth - top) for i in ends]
        where = [place[i] for i in origins]
        return tuple(map(repr, (self.groups, where, edges, leaves, points)))

    def check(self) -> None:
        """Raises ValueError for what no rollout can use."""
        inner = {node.parent for node in self.nodes}
        dead = [i for i in range(len(self.nodes)) if i not in inner and i not in self.leaves]
        if dead or not self.leaves:
            raise ValueError(f"plan: nothing leaves nodes {dead[:5]}, and they are no leaves")
        if self.points and self.trained:
            raise ValueError("plan: has points to match and trained edges; expected one of them")


def require_one_form(plans: Sequence[Plan]) -> None:
    """Raise ValueError where the plans of a rollout differ in what training and credit look at."""
    distinct = [*{id(plan): plan for plan in plans}.values()]
    if len(distinct) > 1 and len({plan.form() for plan in distinct}) > 1:
        told = (len(plan.points or plan.trained) for plan in distinct)
        raise ValueError(
            f"plans: have {', '.join(map(str, told))} choices; expected plans of one form: as many "
            "leaves, choices and sites, of one group and order"
        )


@lru_cache(maxsize=65536)
def _sde_edge(
    sigma: float, sigma_next: float, kind: str | Sampler, noise_level: float
) -> tuple[Coefficients, float, float]:
    """With its k and its std."""
    edge = edge_coefficients(sigma, sigma_next, kind, noise_level)
    return edge, float(edge.k), float(edge.std)


@lru_cache(maxsize=65536)
def _ode_edge(path: tuple[float, ...], order: int, variant: str) -> Coefficients:
    if order == 1:
        return edge_coefficients(path[-2], path[-1], "ode", 0.0)
    return multistep_coefficients(path, order, variant)
