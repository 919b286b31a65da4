"""The algorithms once more, as plainly as they can be said: one sample and one step at a time.

Every image is walked alone, from its own noise, with a network call for each of its steps; nothing
is shared, batched, sharded or drawn again. Steps, densities and losses are spelled out from the
papers, and neither flowkern.rollout nor flowkern.rl is imported: the engine is held to this file.

The one thing a loop has to share with the engine is where noise comes from. A prompt has the id
((iteration << 16) + slot) << 23, and member m of it the id + m: the normals of step i of a walk are
those of (seed, id of the walk's member, i), the initial ones those of stream "init" of its root.
Each loop says which root and which member a walk has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import flowkern as fk

Network = Callable[[Tensor, float, int], Tensor]
"""(x (*D), sigma, slot of the prompt) -> velocity (*D)"""
Table = list[list[float]]
"""Numbers of every image of every prompt."""


@dataclass(frozen=True)
class World:
    """What a loop needs beside the algorithm."""

    network: Network
    """With the weights that sample."""
    shape: tuple[int, ...] = (2, 4, 4)
    seed: int = 11
    iteration: int = 0
    guidance: float = 1.0
    uncond: int = -1
    """The slot that stands for no prompt."""

    def noise(self, slot: int, member: int, step: int, stream: str = "step") -> Tensor:
        sample_id = torch.tensor([(((self.iteration << 16) + slot) << 23) + member])
        return fk.philox_normal((1, *self.shape), self.seed, sample_id, step, stream)[0].double()

    def velocity(self, network: Network, x: Tensor, sigma: float, slot: int) -> Tensor:
        """With guidance; the half without a prompt has no gradient."""
        v = network(x, sigma, slot)
        if self.guidance == 1:
            return v
        uncond = network(x, sigma, self.uncond).detach()
        return uncond + self.guidance * (v - uncond)


# ---- walks ----


@dataclass(frozen=True)
class Step:
    sigma_next: float
    solver: str = "ode"
    """ "ode" (Euler), "dpm" (DPM-Solver++ 2M), or an SDE: "flow_sde", "dance_sde", "cps",
    "precise"."""
    level: float = 0.0
    weight: float | None = None
    """Of the policy loss of this step; None: it is not trained."""
    member: int | None = None
    """Whose noise it has; None: that of the walk's member."""


@dataclass(frozen=True)
class Walk:
    """The way of one sample from sigma 1 to its image."""

    root: int
    member: int
    path: Sequence[Step]
    group: int = 0
    """Images of a prompt with the same number are compared with each other."""


@dataclass
class Move:
    """A trained step that a sample has taken."""

    slot: int
    x: Tensor
    sigma: float
    step: Step
    x_next: Tensor
    old_velocity: Tensor
    images: list[int] = field(default_factory=list)
    """Which images of the prompt came of it."""


def mean_and_std(x: Tensor, v: Tensor, sigma: float, step: Step) -> tuple[Tensor, float]:
    """Of the next state, given the velocity here."""
    n, level = step.sigma_next, step.level
    dt = n - sigma
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if step.solver == "cps":
        angle = level * math.pi / 2
        return (1 - n) * clean + n * math.cos(angle) * noise, n * math.sin(angle)
    if step.solver == "precise":
        std = n * math.sqrt(1 - (n * (1 - sigma) / (sigma * (1 - n))) ** level**2)
        return (1 - n) * clean + math.sqrt(n**2 - std**2) * noise, std
    if step.solver == "flow_sde":  # 1 - sigma is 0 at pure noise, where the next level stands in
        g = level * math.sqrt(sigma / (1 - (n if sigma == 1 else sigma)))
    else:
        assert step.solver == "dance_sde"
        g = level
    score = -noise / sigma
    return x + (v - g**2 / 2 * score) * dt, g * math.sqrt(-dt)


def dpm(x: Tensor, sigma: float, sigma_next: float, predictions: list[tuple[float, Tensor]]):
    """DPM-Solver++, second order (midpoint) where there is an earlier prediction to use.

    predictions: (sigma, clean prediction) of the walk so far, this state's the last.
    """
    if sigma_next == 0:
        return predictions[-1][1]

    def log_snr(s: float) -> float:
        return math.log((1 - s) / s) if s < 1 else -math.inf

    h = log_snr(sigma_next) - log_snr(sigma)
    clean = predictions[-1][1]
    if len(predictions) > 1 and predictions[-2][0] < 1:
        r = (log_snr(sigma) - log_snr(predictions[-2][0])) / h
        clean = clean + (clean - predictions[-2][1]) / (2 * r)
    return sigma_next / sigma * x - (1 - sigma_next) * math.expm1(-h) * clean


def walk(world: World, slot: int, way: Walk) -> tuple[Tensor, dict[tuple[int, int], Move]]:
    """The image, and the trained moves by (member, number of the step)."""
    x, sigma = world.noise(slot, way.root, 0, "init"), 1.0
    predictions, moves = [], {}
    for i, step in enumerate(way.path):
        member = way.member if step.member is None else step.member
        with torch.no_grad():
            v = world.velocity(world.network, x, sigma, slot)
        predictions.append((sigma, x - sigma * v))
        if step.solver == "ode":
            x_next = x + (step.sigma_next - sigma) * v
        elif step.solver == "dpm":
            x_next = dpm(x, sigma, step.sigma_next, predictions)
        else:
            mean, std = mean_and_std(x, v, sigma, step)
            x_next = mean + std * world.noise(slot, member, i)
        if step.weight is not None:
            moves[member, i] = Move(slot, x, sigma, step, x_next, v)
        x, sigma = x_next, step.sigma_next
    assert sigma == 0
    return x, moves


def sample(
    world: World, slot: int, ways: Sequence[Walk]
) -> tuple[list[Tensor], dict[tuple[int, int], Move]]:
    """All images of a prompt, and its moves; images of one move and several tails share it."""
    images, moves = [], {}
    for way in ways:
        image, taken = walk(world, slot, way)
        for key, move in taken.items():
            first = moves.setdefault(key, move)
            assert torch.equal(first.x_next, move.x_next)
            first.images.append(len(images))
        images.append(image)
    return images, moves


# ---- the walks of a prompt, by algorithm ----


def all_drawn(sigmas, size, solver, level, weight=lambda sigma, n: 1.0) -> list[Walk]:
    """Flow-GRPO, CPS, GRPO-Guard: every step is drawn, all but the last are trained.

    Every sample is a member with its own root. level: one, or one for each step.
    """
    level = level if isinstance(level, list) else [level] * (len(sigmas) - 1)
    path = [
        Step(n, solver, a, weight(s, n)) for (s, n), a in zip(pairs(sigmas), level, strict=True)
    ]
    path[-1] = Step(0.0, solver, level[-1])
    return [Walk(m, m, path) for m in range(size)]


def dance_grpo(
    sigmas, chosen: Sequence[set[int]], level: float = 0.3, solver: str = "dance_sde"
) -> list[Walk]:
    """Root 0 for all; the last step is the clean prediction. chosen: steps each member trains."""
    walks = []
    for m, trained in enumerate(chosen):
        path = [
            Step(n, solver, level, 1.0 if i in trained else None)
            for i, (_, n) in enumerate(pairs(sigmas[:-1]))
        ]
        walks.append(Walk(0, m, [*path, Step(0.0)]))
    return walks


def gardo(sigmas, size: int, trained: int, own_root=False, level: float = 0.7) -> list[Walk]:
    """Every step is drawn, the first ones are trained. Root 0 for all, unless each has its own."""
    path = [
        Step(n, "flow_sde", level, 1.0 if i < trained else None)
        for i, (_, n) in enumerate(pairs(sigmas))
    ]
    return [Walk(m if own_root else 0, m, path) for m in range(size)]


def window(sigmas, drawn: Container[int], size: int, solver, level, own_root=False) -> list[Walk]:
    """Flow-GRPO-Fast, MixGRPO: the steps `drawn` are drawn and trained, the others are Euler's.

    Every sample is a member; they share root 0 unless each has its own.
    """
    path = [
        Step(n, solver, level, 1.0) if i in drawn else Step(n)
        for i, (_, n) in enumerate(pairs(sigmas))
    ]
    return [Walk(m if own_root else 0, m, path) for m in range(size)]


def rectified(sigmas, drawn: Container[int], size: int, early: int, solver, levels) -> list[Walk]:
    """Flash-GRPO: one of the first `early` steps is drawn, each sample from its own root, and
    weighted with 1 / the slope of its log-density by the velocity: 1 on average over those steps.
    """

    def slope(i: int) -> float:
        step = Step(sigmas[i + 1], solver, levels[i])
        (at_0, std), (at_1, _) = (
            mean_and_std(torch.zeros(()).double(), torch.tensor(v).double(), sigmas[i], step)
            for v in (0.0, 1.0)
        )
        per_mean = 2 * std if solver == "cps" else 1 / std  # of a next state one std away
        return abs(float(at_1 - at_0)) * per_mean

    (i,) = drawn
    weight = 1 / slope(i) / statistics.fmean(1 / slope(k) for k in range(early))
    path = [Step(n) for n in sigmas[1:]]
    path[i] = Step(sigmas[i + 1], solver, levels[i], weight)
    return [Walk(m, m, path) for m in range(size)]


def flash(steps: int, drawn: range, size: int, ratio: float, level=0.7, shift=3.0) -> list[Walk]:
    """MixGRPO-Flash: after the last drawn step, int((T - L) ratio) points are left, solved in the
    second order; one step at least.
    """

    def sigma(u: float) -> float:
        return shift * u / (1 + (shift - 1) * u)

    head = [sigma(1 - i / steps) for i in range(drawn[-1] + 2)]
    path = [
        Step(n, "flow_sde", level, 1.0) if i in drawn else Step(n)
        for i, (_, n) in enumerate(pairs(head))
    ]
    left = max(1, int(max((steps - drawn[-1]) * ratio, 1)) - 1)
    u = 1 - (drawn[-1] + 1) / steps
    path += [Step(sigma(u * (1 - i / left)), "dpm") for i in range(1, left + 1)]
    return [Walk(0, m, path) for m in range(size)]


def tempflow(sigmas, seeds: int, branches: int, level: float = 0.7) -> list[Walk]:
    """Euler's walk from every root, but for one step that is drawn: each in turn, `branches` times.

    Weighted by the step's std, 1 on average. Groups are (root, step). The first of a root's
    members has its noise.
    """
    steps = len(sigmas) - 1
    edges = pairs(sigmas)[: steps - 1]
    nothing = torch.zeros(())
    std = [mean_and_std(nothing, nothing, s, Step(n, "flow_sde", level))[1] for s, n in edges]
    walks = []
    for root in range(seeds):
        for i in range(steps - 1):
            path = [Step(n) for n in sigmas[1:]]
            path[i] = Step(path[i].sigma_next, "flow_sde", level, std[i] / statistics.fmean(std))
            for k in range(branches):
                member = root * branches + k
                walks.append(Walk(root * branches, member, path, root * (steps - 1) + i))
    return walks


def g2rpo(sigmas, depth: int, size: int, strides: Sequence[int], level: float = 0.7) -> list[Walk]:
    """Euler's walk from root 0 to one of the first `depth` steps, which is drawn; then a tail for
    every stride, ending in the clean prediction of its last state. Groups are (step, stride).
    """
    walks = []
    for k in range(depth):
        for m in range(size):
            for place, stride in enumerate(strides):
                drawn = Step(sigmas[k + 1], "flow_sde", level, 1.0)
                tail = [*sigmas[k + 2 :: stride][:-1], 0.0]
                path = [*map(Step, sigmas[1 : k + 1]), drawn, *map(Step, tail)]
                walks.append(Walk(0, m, path, k * len(strides) + place))
    return walks


def tree(sigmas, parted: dict[int, Sequence[int]], solver, levels: dict[int, float]) -> list[Walk]:
    """From root 0; the steps of `levels` are drawn, and trained once the samples have parted.

    parted: from a step on, whose noise each sample has.
    """
    walks = []
    for m in range(len(next(iter(parted.values())))):
        path, whose, weight = [], 0, None
        for i, (_, n) in enumerate(pairs(sigmas)):
            if i in parted:
                whose, weight = parted[i][m], 1.0
            path.append(Step(n, solver, levels[i], weight, whose) if i in levels else Step(n))
        walks.append(Walk(0, 0, path))
    return walks


def dense(sigmas, size: int, levels: Sequence[float]) -> list[Walk]:
    """The first k steps drawn and trained, the others Euler's, for every k but all."""
    walks = []
    for m in range(size):
        for k in range(len(sigmas) - 1):
            path = [Step(n) for n in sigmas[1:]]
            path[:k] = [Step(sigmas[i + 1], "flow_sde", levels[i], 1.0) for i in range(k)]
            walks.append(Walk(m, m, path))
    return walks


def awm(sigmas, size: int, level: float = 0.4, solver="dpm", ratio: float = 0.5) -> list[Walk]:
    """Drawn where .3 <= sigma <= .9, DPM-Solver++ elsewhere; no step is trained."""
    path = [
        Step(n, "flow_sde", level) if 0.3 <= s <= 0.9 else Step(n, solver)
        for s, n in pairs(ending(sigmas, ratio))
    ]
    return [Walk(m, m, path) for m in range(size)]


def nft(sigmas, size: int, solver="dpm", ratio: float = 0.5) -> list[Walk]:
    """DPM-Solver++, from a root of each sample's own."""
    return [Walk(m, m, [Step(n, solver) for n in ending(sigmas, ratio)[1:]]) for m in range(size)]


def ending(sigmas: Sequence[float], ratio: float) -> list[float]:
    """Where the last level above 0 is less than this share of the one before, it becomes that."""
    out = list(sigmas)
    if out[-2] < ratio * out[-3]:
        out[-2] = ratio * out[-3]
    return out


def pairs(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(sigmas))


# ---- advantages ----


def advantages(
    rewards: Table, groups: Sequence[int], eps: float, unbiased: bool = False,
    all_std: bool = False, divided: bool = True,
) -> Table:  # fmt: skip
    """(r - mean) / (std + eps) within the groups of each prompt; NaN: an image without a reward.

    all_std: the std of all rewards there are.
    """
    spread = statistics.stdev if unbiased else statistics.pstdev
    everything, out = [r for row in rewards for r in row if r == r], []
    for row in rewards:
        out.append([])
        for reward, group in zip(row, groups, strict=True):
            mates = [r for r, g in zip(row, groups, strict=True) if g == group and r == r]
            compared = everything if all_std else mates
            std = spread(compared) if len(compared) > 1 else 0
            mean = statistics.fmean(mates) if mates else 0
            out[-1].append((reward - mean) / (std + eps) if divided else reward - mean)
    return out


def win_rates(rewards: Table, groups: Sequence[int]) -> Table:
    """Every image against all others of its group that have a reward; a tie is half a win."""
    out = []
    for row in rewards:
        out.append([])
        for i, (mine, group) in enumerate(zip(row, groups, strict=True)):
            others = [
                r for j, (r, g) in enumerate(zip(row, groups, strict=True))
                if j != i and g == group and r == r
            ]  # fmt: skip
            points = [1.0 if mine > r else 0.5 if mine == r else 0.0 for r in others]
            rate = statistics.fmean(points) if points else 0.5
            out[-1].append(rate if mine == mine else math.nan)
    return out


def mean_reward(rewards: Sequence[float], move: Move, *_: int) -> float:
    """What a move of a tree is worth: the mean of the images that came of it."""
    there = [rewards[i] for i in move.images if rewards[i] == rewards[i]]
    return statistics.fmean(there) if there else math.nan


def gain(rewards: Sequence[float], move: Move, member: int, step: int, steps: int) -> float:
    """What a move of `dense` is worth: the image after it, less the one before it."""
    before = member * steps + step
    return rewards[before + 1] - rewards[before]


def mixed(
    rewards: dict[str, Table], weights: dict[str, float], groups: Sequence[int],
    mix: str = "reward", by_wins: bool = False, **options,
) -> Table:  # fmt: skip
    """Of the weighted sum of the rewards ("reward"), or the weighted "mean" or "sum" of the
    advantages that every reward gives. by_wins: of win rates in their place.
    """
    if by_wins:
        rewards = {name: win_rates(table, groups) for name, table in rewards.items()}
    if mix == "reward":
        return advantages(weighted(rewards, weights), groups, **options)
    total = sum(weights.values()) if mix == "mean" else 1.0
    parts = {name: advantages(table, groups, **options) for name, table in rewards.items()}
    return weighted(parts, {name: weight / total for name, weight in weights.items()})


def by_distance(advantage: Table, apart: Table) -> Table:
    """GARDO: what is good counts by how far it is from its group, over the group's mean."""
    out = []
    for row, far in zip(advantage, apart, strict=True):
        there = [d for a, d in zip(row, far, strict=True) if a == a]
        mean = statistics.fmean(there) if there else 1.0
        out.append([a * d / mean if a > 0 else a for a, d in zip(row, far, strict=True)])
    return out


def uncertain(reward: Table, others: Sequence[Table], share: float) -> list[list[bool]]:
    """GARDO: the images whose reward beats more of all images than the others' do on average."""

    def wins(table: Table) -> list[float]:
        everything = [r for row in table for r in row if r == r]
        return [sum(mine > r for r in everything) / len(everything) for mine in everything]

    own, *rest = (wins(table) for table in (reward, *others))
    found = [w - statistics.fmean(o) for w, *o in zip(own, *rest, strict=True)]
    least, left = np.percentile(found, 100 * (1 - share)), iter(found)
    return [[r == r and next(left) > least for r in row] for row in reward]


def weighted(tables: dict[str, Table], weights: dict[str, float]) -> Table:
    parts = [w * torch.tensor(tables[name], dtype=torch.float64) for name, w in weights.items()]
    return sum(parts).tolist()


def extremes(advantage: Sequence[float], count: int | None) -> set[int]:
    """Which of a group are trained: the best and the worst count / 2; None: all."""
    there = [i for i, a in enumerate(advantage) if a == a]
    order = sorted(there, key=lambda i: advantage[i])
    return set(order if count is None else order[: count // 2] + order[-(count // 2) :])


def clamp(value: float, limit: float = 5.0) -> float:
    return max(-limit, min(limit, value))


# ---- losses ----


def log_density(x_next: Tensor, mean: Tensor, std: float, solver: str) -> Tensor:
    """Mean over the elements; CPS leaves out the variance and the constants."""
    if solver == "cps":
        return -((x_next - mean) ** 2).mean()
    return torch.distributions.Normal(mean, std).log_prob(x_next).mean()


def clipped(ratio: Tensor, advantage: float, clip: float) -> Tensor:
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def policy_loss(
    world: World, network: Network, move: Move, advantage: float, clip: float,
    kl_coef: float = 0.0, reference: Network | None = None, guard: bool = False,
    threshold: float | None = None,
) -> Tensor:  # fmt: skip
    """Of one move under the weights of today; world has those that sampled it."""
    state = (move.x, move.sigma, move.slot)
    mean, std = mean_and_std(move.x, world.velocity(network, *state), move.sigma, move.step)
    mean_old, _ = mean_and_std(move.x, move.old_velocity, move.sigma, move.step)
    new, old = (log_density(move.x_next, m, std, move.step.solver) for m in (mean, mean_old))
    if guard:  # its mean is taken out of the log-ratio, which is then measured in stds
        ratio = ((new - old + ((mean - mean_old) ** 2).mean() / (2 * std**2)) * std).exp()
    else:
        ratio = (new - old).exp()
    if threshold is None:
        loss = clipped(ratio, advantage, clip)
    else:
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, std), torch.distributions.Normal(mean_old, std)
        ).mean()
        goes_away = (ratio - 1) * advantage > 0
        loss = torch.zeros(()) * mean.sum() if goes_away and kl >= threshold else -advantage * ratio
    loss = move.step.weight * loss
    if kl_coef:
        anchor = world.velocity(reference, *state).detach()
        mean_ref, _ = mean_and_std(move.x, anchor, move.sigma, move.step)
        loss = loss + kl_coef * ((mean - mean_ref) ** 2).mean() / (2 * std**2)
    return loss


def distillation_loss(
    world: World, network: Network, move: Move, teacher: Network, scale: float, both: bool = False
) -> Tensor:
    """Of one move the KL to a teacher's, guided by `scale`; half the squared distance of the means
    where a step has no noise. both: the half without a prompt has a gradient, too."""

    def velocity(network: Network, scale: float) -> Tensor:
        v = network(move.x, move.sigma, move.slot)
        if scale == 1:
            return v
        uncond = network(move.x, move.sigma, world.uncond)
        return (uncond if both else uncond.detach()) * (1 - scale) + scale * v

    mean, std = mean_and_std(move.x, velocity(network, world.guidance), move.sigma, move.step)
    told = velocity(teacher, scale).detach()
    wanted, _ = mean_and_std(move.x, told, move.sigma, move.step)
    if std == 0:
        return ((mean - wanted) ** 2).mean() / 2
    return torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(wanted, std)
    ).mean()


def awm_loss(
    network: Network, x0: Tensor, e: Tensor, t: float, slot: int, advantage: float,
    pulls: Sequence[tuple[float, Network]] = (), clip: float = 1.0, limit: float = 5.0,
    weighting: str = "ghuber", p: float = 0.25,
) -> Tensor:  # fmt: skip
    """On policy: the old log-likelihood is today's. pulls: (coefficient, anchor).

    advantage: clamped to +-limit.
    """
    x_t = (1 - t) * x0 + t * e
    v = network(x_t, t, slot)
    m = ((v - (e - x0)) ** 2).mean()
    log_likelihood = {
        "ghuber": -t / p * ((m + 1e-10) ** p - 1e-10**p),
        "huber": -t * ((m + 1e-10).sqrt() - 1e-5),
    }[weighting]
    loss = clipped((log_likelihood - log_likelihood.detach()).exp(), advantage / limit, clip)
    for coefficient, anchor in pulls:
        loss = loss + coefficient * ((v - anchor(x_t, t, slot).detach()) ** 2).mean()
    return loss


def elbo(t: float) -> float:
    """1 / (2 std^2), with AWM's std."""
    std = 0.7 * math.sqrt(t / (1 - min(t, 0.99)))
    return 1 / (2 * std**2)


def nft_loss(
    network: Network, old: Network, x0: Tensor, e: Tensor, t: float, slot: int, advantage: float,
    pulls: Sequence[tuple[float, Network]] = (), beta: float = 1.0, limit: float = 5.0,
    adaptive: bool = True,
) -> Tensor:  # fmt: skip
    """In the space of clean predictions, as released; advantage: clamped to +-limit."""
    x_t = (1 - t) * x0 + t * e
    v, v_old = network(x_t, t, slot), old(x_t, t, slot).detach()
    share, loss = max(0.0, min(1.0, 0.5 + advantage / (2 * limit))), 0.0
    for part, policy in (
        (share, (1 - beta) * v_old + beta * v),
        (1 - share, (1 + beta) * v_old - beta * v),
    ):
        error = x_t - t * policy - x0
        scale = max(float(error.detach().abs().mean()), 1e-5) if adaptive else 1.0
        loss = loss + part * (error**2).mean() / scale
    loss = limit / beta * loss
    for coefficient, anchor in pulls:
        loss = loss + coefficient * ((v - anchor(x_t, t, slot).detach()) ** 2).mean()
    return loss


Group = Sequence[tuple[Tensor, Tensor, float, int, float]]
"""(x0, noise, sigma, slot, advantage clamped to +-limit) of all that is compared."""


def errors(network: Network, x0: Tensor, e: Tensor, t: float, slot: int) -> tuple[Tensor, Tensor]:
    """The velocity at an image with noise, and what is wrong with it."""
    v = network((1 - t) * x0 + t * e, t, slot)
    return v, v - (e - x0)


def guided(network: Network, scale: float, no_prompt: int) -> Network:
    def velocity(x: Tensor, sigma: float, prompt: int) -> Tensor:
        uncond = network(x, sigma, no_prompt)
        return uncond + scale * (network(x, sigma, prompt) - uncond)

    return velocity


def dgpo_loss(
    network: Network, against: Network, old: Network, group: Group, size: int, beta: float,
    clip: float, kl: float = 0.0, pull_to: Network | None = None,
) -> Tensor:  # fmt: skip
    """-log sigmoid of the group's preference, whose slope at 0 is that of the errors."""
    preference, pulls = 0.0, 0.0
    for *point, a in group:
        v, error = errors(network, *point)
        error_against = errors(against, *point)[1]
        d, d_old = (error**2).mean(), (errors(old, *point)[1] ** 2).mean()
        ratio = float((d_old - d).detach().exp())
        if ratio > 1 + clip if a > 0 else ratio < 1 - clip:
            d = d.detach()
        preference = preference - beta / size * a * (d - (error_against**2).mean().detach())
        pulls = pulls + kl * ((v - errors(pull_to or against, *point)[0].detach()) ** 2).mean()
    return -size / beta * torch.nn.functional.logsigmoid(preference) + pulls


def crd_loss(
    network: Network, old: Network, reference: Network, group: Group, kl: float, beta: float = 1.0,
    least: float = 1e-4, adaptive: bool = True, limit: float = 5.0,
) -> Tensor:  # fmt: skip
    """least: of the KL's coefficient where the reward is 0, of kl where it is 1, if adaptive."""
    implicit, rewards, pulls = [], [], 0.0
    for *point, a in group:
        (v, error), error_old = errors(network, *point), errors(old, *point)[1].detach()
        size, size_old = (
            max(float(x.detach().abs().mean()), 1e-5) if adaptive else 1.0
            for x in (error, error_old)
        )
        implicit.append((error_old**2).mean() / size_old - (error**2).mean() / size)
        rewards.append(0.5 + a / (2 * limit))
        strength = least + rewards[-1] * (kl - least) if adaptive else kl
        pulls = pulls + strength * ((v - errors(reference, *point)[0].detach()) ** 2).mean()
    mean, mean_reward = sum(implicit).detach() / len(group), sum(rewards) / len(group)
    off = [beta * (r - mean) - (w - mean_reward) for r, w in zip(implicit, rewards, strict=True)]
    return limit / beta * sum(x**2 for x in off) + pulls
