"""How velocities of sampling come back in training: rows of a rollout, asked once more through the
network as it learns, in batches of several shapes.

R rows that are compared: a site of the plan for one prompt each. C choices (trained edges, or
points) at them, n rows of one network call, *D one latent. Nothing here moves a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowkern.models import Conditioning, Model
from flowkern.ops.matching_loss import add_noise, matching_loss
from flowkern.ops.policy_loss import policy_loss
from flowkern.rollout import Blocks, Layout, Rollout, StepBatch
from flowkern.rollout import batch as gathered
from flowkern.rollout.engine import Velocity, guided, slices
from flowkern.rollout.layout import Points
from flowkern.rollout.moves import indices, moved, picked
from flowkern.rollout.states import OnHost
from flowkern.train.flow import NETWORK
from flowkern.train.loop import Loop

GRADIENT = "uncond_gradient"  # a guidance argument that says nothing of a velocity
ALONE = 2  # rows of each noise level that are asked by themselves


@dataclass(frozen=True)
class Call:
    """A network call without gradient, whose velocities training compares with."""

    x_t: Tensor
    """(n, *D), or with guidance (2 n, *D): once more without a prompt."""
    sigma: Tensor
    """As long; so are rows, levels and velocity."""
    rows: Conditioning
    levels: Sequence[float] | None
    velocity: Tensor
    row: Tensor
    """(n,): which of R each of the first n is, on the host; -1: none that is compared."""


@dataclass(frozen=True)
class Answer:
    """What the network says of n rows, as a loss takes it."""

    velocity: Tensor
    """(n, *D)"""
    guide: Mapping[str, Any]
    """The guidance arguments of a loss; none without guidance."""

    @property
    def guided(self) -> Tensor:
        """(n, *D), in float32 at least."""
        return guided(self.velocity, **{k: v for k, v in self.guide.items() if k != GRADIENT})

    def at(self, rows: Tensor | slice) -> Answer:
        guide = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.guide.items()}
        return Answer(self.velocity[rows], guide)


@dataclass(frozen=True)
class Compared:
    """Of choices (C,), on the host."""

    row: Tensor
    """Which of R it leaves."""
    sigma: Tensor
    log_ratio: Tensor
    error: Tensor
    """Of the velocity: the root mean square of the difference over that of the velocity."""

    @staticmethod
    def cat(parts: Sequence[Compared]) -> Compared:
        return Compared(*(torch.cat(values) for values in zip(*map(_values, parts), strict=True)))


def _values(one: Compared) -> tuple[Tensor, ...]:
    return one.row, one.sigma, one.log_ratio, one.error


class Replay:
    """A rollout of a run, its first: of each depth of its plan one network call, the first in which
    something is trained, and what leads there."""

    def __init__(self, loop: Loop, iteration: int = 0) -> None:
        self.loop, self.task, self.iteration = loop, loop.task, iteration
        task, config = self.task, loop.config
        self.halves = 1 if task.guidance is None else 2
        self.size = config.train.max_batch // self.halves
        """Rows of a call in sampling, at most."""
        self.learn_size = max(1, config.train.max_batch // task.objective.together)
        drawn = [prompt["prompt"] for prompt in task.draw_prompts(iteration)]
        self.others = [max(range(len(drawn)), key=lambda i: len(drawn[i])), len(drawn)]
        """Places of the longest prompt and of none, which is the shortest."""
        texts = [*drawn, task.model.guidance.negative_prompt]
        self.conditioning = task.model.encode(texts).to(task.device)
        with loop.weights.using(loop.sampler):
            self.rollout, self.calls = self._sampled()
        if isinstance(self.rollout.layout.trained, Points):
            self.calls = self._anchored()
        known = [(call, (call.row >= 0).nonzero().flatten()) for call in self.calls]
        self.old = torch.cat([self.answer(call).guided[place] for call, place in known])
        """(R, *D), guided: what a ratio is formed with."""

    @property
    def sigma(self) -> Tensor:
        """(R,) float32, on the host."""
        deal, sites = self.rollout.deal, self.rollout.layout.sites
        return deal.sigma[deal.at(self.site, self.prompt, sites)].float()

    @property
    def trained(self) -> torch.nn.Module:
        return self.loop.weights.trained[NETWORK]

    @property
    def learn(self) -> Velocity:
        """As in training."""
        return self.task.velocity(self.conditioning, self.trained)

    # ---- what sampling does ----

    def _sampled(self) -> tuple[Rollout, list[Call]]:
        """What is not needed for the rows that are compared is answered with zeros, unasked."""
        task = self.task
        blocks = task.sample(self.iteration, self.conditioning)
        parts = list(_calls(blocks, self.size))
        chosen, needed = _chosen(parts)
        wanted = [any((layout, node) in needed for node, _ in part) for layout, part in parts]
        sites, prompts, calls = [], [], []
        with heard(task.model, wanted) as found:
            for _ in blocks:
                pass
        for (layout, part), call in ((parts[i], found[i]) for i in chosen):
            row, site = [], {node: i for i, node in enumerate(layout.origins)}
            for node, prompt in part:
                row.append(len(sites) if node in site else -1)
                if node in site:
                    sites.append(site[node])
                    prompts.append(prompt)
            calls.append(replace(call, row=torch.tensor(row)))
        self.site, self.prompt = torch.tensor(sites), torch.tensor(prompts)
        return blocks.rollout, calls

    def _anchored(self) -> list[Call]:
        """Of points, as an anchor is asked: in the batches of training, which are the only ones."""
        leaf = self.rollout.layout.trained.leaf
        sites = (leaf == 0).nonzero().flatten()
        count = len(self.task.slots)
        self.site = sites.repeat(count)
        self.prompt = torch.arange(count).repeat_interleave(len(sites))
        calls, velocity = [], self.task.velocity(self.conditioning)
        with torch.no_grad():
            for part in slices(len(self.site), self.learn_size):
                row = torch.arange(part.start, part.stop)
                with heard(self.task.model, [True]) as found:
                    self.ask(velocity, row)
                calls.append(replace(found[0], row=row))
        return calls

    def answer(self, call: Call, velocity: Tensor | None = None) -> Answer:
        """To a call: its own, or another."""
        v = call.velocity if velocity is None else velocity
        if len(v) == len(call.row):
            return Answer(v, {})
        v, uncond = v.chunk(2)
        return Answer(*self.task.guidance.combined(v, uncond, call.sigma[: len(v)]))

    # ---- asking again ----

    def stored(self, call: Call) -> Tensor:
        """The states of a call as training has them."""
        x_t, is_row = call.x_t.clone(), call.row >= 0
        if isinstance(self.rollout.layout.trained, Points):
            return x_t
        row, device = call.row[is_row], x_t.device
        kept, origins = self.rollout.kept, self.rollout.layout.origins
        places = torch.tensor([kept[origins[site]] for site in self.site[row].tolist()])
        states = picked(self.rollout.states, *indices([places, self.prompt[row]], device), device)
        here = moved(is_row.nonzero().flatten(), device)
        for half in range(len(x_t) // len(is_row)):
            x_t[here + half * len(is_row)] = states.to(x_t.dtype)
        return x_t

    def again(self, call: Call, x_t: Tensor, network: torch.nn.Module | None = None) -> Tensor:
        """What the network says of a call, with or without gradients as they are on or off."""
        options = {"network": network, "sigma_host": call.levels}
        return self.task.model.velocity(x_t, call.sigma, call.rows, **options).detach()

    def ask(self, velocity: Velocity, row: Tensor, told: Sequence[int] | None = None) -> Answer:
        """Rows as one batch of the objective.

        told: the prompts that the network is told in place of theirs.
        """
        batch, objective = self._batch(row), self.task.objective
        if told is not None:
            prompt = moved(torch.tensor(told), batch.prompt.device)
            on_host = OnHost(batch.on_host.sigma, list(told))
            batch = replace(batch, prompt=prompt, on_host=on_host)
        if isinstance(self.rollout.layout.trained, Points):
            x_t = add_noise(batch.x0, batch.sigma, **batch.key)
            return Answer(velocity(x_t, batch.sigma, batch.prompt, batch.on_host).detach(), {})
        v, guide = objective.ask(velocity, batch, None)
        guide = {k: x.detach() if isinstance(x, Tensor) else x for k, x in guide.items()}
        return Answer(v.detach(), guide)

    def told(self, velocity: Velocity, row: Tensor, prompts: Sequence[int]) -> Tensor:
        """(len(row), *D): rows as one batch of whatever prompts, without guidance."""
        batch = self._batch(row)
        x_t = (
            batch.x_t
            if isinstance(batch, StepBatch)
            else add_noise(batch.x0, batch.sigma, **batch.key)
        )
        prompt = moved(torch.tensor(prompts), batch.prompt.device)
        return velocity(x_t, batch.sigma, prompt, OnHost(batch.on_host.sigma, list(prompts)))

    def _batch(self, row: Tensor) -> Any:
        count = len(self.rollout.layout.trained.site)
        nothing = torch.zeros(len(self.task.slots), count)
        return gathered(self.rollout, self.site[row], self.prompt[row], nothing, True)

    def compare(self, row: Tensor, answer: Answer, old: Tensor | None = None) -> Compared:
        """Answers to rows with those of sampling, or with others, (len(row), *D) and guided."""
        batch, objective = self._batch(row), self.task.objective
        old = self.old[moved(row, self.old.device)] if old is None else old
        if isinstance(self.rollout.layout.trained, Points):
            out = matching_loss(
                answer.velocity, batch.x0, batch.sigma, batch.advantage, old_velocity=old,
                objective=objective.objective, weighting=objective.weighting,
                ghuber_power=objective.ghuber_power, reduction="none", **batch.key,
            )  # fmt: skip
            of = torch.arange(len(row))
        else:
            out = policy_loss(
                answer.velocity, batch.x_t, batch.x_next, batch.coefficients, batch.advantage,
                row=batch.row, old_velocity=old, ratio=objective.ratio, reduction="none",
                **answer.guide,
            )  # fmt: skip
            of = torch.arange(len(row)) if batch.row is None else batch.row.cpu()
        size = old.double().flatten(1).norm(dim=1)
        error = (answer.guided.double() - old).flatten(1).norm(dim=1) / size.clamp(min=1e-30)
        sigma = batch.sigma.double().cpu()
        return Compared(row[of], sigma[of], out.log_ratio.double().cpu(), error.cpu()[of])

    # ---- in several shapes ----

    def shapes(self) -> dict[str, Compared]:
        """By what batches are like: "equal" to sampling's, "training"'s, each row "alone", "mixed"
        with prompts of other lengths and with other noise levels. Where points are matched, those
        of training are the equal ones, and are not said twice."""
        out = {"equal": self.equal()}
        if not isinstance(self.rollout.layout.trained, Points):
            order = sorted(range(len(self.site)), key=lambda i: (self.prompt[i], self.site[i]))
            parts = slices(len(order), self.learn_size)
            out["training"] = self._batched(torch.tensor(order[part]) for part in parts)
        out["alone"] = self._batched(row.view(1) for row in self._of_each_level())
        if self.size > 1:
            shuffled = torch.randperm(len(self.site), generator=torch.Generator().manual_seed(0))
            out["mixed"] = Compared.cat(
                [self._mixed(part) for part in shuffled.split(max(1, self.size // 2))]
            )
        return out

    def equal(self) -> Compared:
        out = []
        for call in self.calls:
            with torch.enable_grad():
                velocity = self.again(call, self.stored(call), self.trained)
            place = (call.row >= 0).nonzero().flatten()
            out.append(self.compare(call.row[place], self.answer(call, velocity).at(place)))
        return Compared.cat(out)

    def _batched(self, batches: Iterator[Tensor]) -> Compared:
        return Compared.cat([self.compare(row, self.ask(self.learn, row)) for row in batches])

    def _mixed(self, row: Tensor) -> Compared:
        """Beside as many of the longest prompt and of none."""
        told = [*self.prompt[row].tolist(), *self.told_others(len(row))]
        answer = self.ask(self.learn, torch.cat([row, row]), told)
        return self.compare(row, answer.at(slice(len(row))))

    def told_others(self, count: int) -> list[int]:
        return [self.others[i % 2] for i in range(count)]

    def _of_each_level(self) -> Tensor:
        sigma = self.sigma.tolist()
        seen: dict[float, int] = {}
        out = []
        for row, level in enumerate(sigma):
            seen[level] = seen.get(level, 0) + 1
            if seen[level] <= ALONE:
                out.append(row)
        return torch.tensor(out)


@contextmanager
def heard(model: Model, wanted: Sequence[bool]) -> Iterator[list[Call | None]]:
    """Every call of a model's velocity, and what it answered, in order. One that is not wanted is
    answered with zeros."""
    ask, calls = model.velocity, []

    def listening(
        x_t: Tensor, sigma: Tensor, conditioning: Conditioning, sigma_host: Any = None, **more: Any
    ) -> Tensor:
        if not wanted[len(calls)]:
            calls.append(None)
            return torch.zeros_like(x_t)
        velocity = ask(x_t, sigma, conditioning, sigma_host=sigma_host, **more)
        nothing = torch.empty(0, dtype=torch.int64)
        calls.append(Call(x_t.clone(), sigma, conditioning, sigma_host, velocity, nothing))
        return velocity

    model.velocity = listening
    try:
        yield calls
    finally:
        model.velocity = ask


def _calls(blocks: Blocks, size: int) -> Iterator[tuple[Layout, list[tuple[int, int]]]]:
    """The plan, and (node, prompt) of the rows, of every network call that sampling makes, in its
    order."""
    for layout, block in blocks.parts():
        prompts = block.stop - block.start
        for wave in layout.waves[:-1]:
            for part in slices(len(wave.sigma) * prompts, size):
                rows = (divmod(row, prompts) for row in range(part.start, part.stop))
                yield layout, [(wave.nodes[place], block.start + i) for place, i in rows]


def _chosen(
    calls: Sequence[tuple[Layout, Sequence[tuple[int, int]]]],
) -> tuple[list[int], set[tuple[Layout, int]]]:
    """Of each depth the first call that has an origin of trained edges, and the nodes that lead
    to these origins; where points are matched, none, and those that lead to the first leaf."""
    first: dict[int, int] = {}
    origins = {layout: {*layout.origins} for layout, _ in calls}
    for i, (layout, call) in enumerate(calls):
        if any(node in origins[layout] for node, _ in call):
            first.setdefault(layout.plan.nodes[call[0][0]].depth, i)
    needed: set[tuple[Layout, int]] = set()
    asked = [calls[i] for i in first.values()]
    ends = [(of, node) for of, call in asked for node, _ in call if node in origins[of]]
    for layout, node in ends or [(of := calls[0][0], next(iter(of.plan.leaves)))]:
        while node >= 0 and (layout, node) not in needed:
            needed.add((layout, node))
            node = layout.plan.nodes[node].parent
    return list(first.values()), needed
