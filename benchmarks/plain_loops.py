"""One training iteration of each algorithm in plain PyTorch, call for call as the released loops.

Every sample is walked from noise to image, with as many others of its prompt as `batch_size` says;
nothing that samples have in common is shared unless the released loop shares it. A step is the
published formula, operation by operation. It is taken in full where it is deterministic, too: a
noise is drawn that counts for nothing, and a log-probability thrown away. Training visits what was
walked together, step by step, and reads its statistics on the host each time. Model, rewards and
optimizer are those of the trainer it is compared with.

B samples of a move, R network calls that it takes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Noise = Callable[[int, Sequence[int], int, str], Tensor]
"""(slot of the prompt, member of each sample, step, "init" | "step") -> (B, *D)"""


class Step(NamedTuple):
    sigma: float
    sigma_next: float
    is_drawn: bool = False
    is_trained: bool = False
    order: int = 1  # 2: DPM-Solver++, with the clean prediction of the step before


@dataclass
class Move:
    """A trained step of samples that went together."""

    slot: int
    step: Step
    x: Tensor  # (R, *D); R is B, or 1 where all left one state
    x_next: Tensor  # (B, *D)
    log_prob: Tensor  # (B,)
    groups: list[Any] | None = None  # (B,): samples with the same key are compared
    rewards: Tensor | None = None  # (B, Q): of every image that a sample ends in
    advantage: Tensor | None = None  # (B,)
    weight: float = 1.0


class PlainLoop(ABC):
    """`step()` does what the trainer's `step()` does. A subclass says how a prompt is sampled."""

    def __init__(self, trainer, batch_size: int, noise: Noise | None = None):
        """noise: of the first iteration; None: torch.randn, as in all that follow."""
        self.trainer, self.batch_size, self.noise = trainer, batch_size, noise
        self.recipe, self.model, self.device = trainer.recipe, trainer.task.model, trainer.device
        self.guidance_scale = trainer.recipe.guidance_scale
        self.both_halves_learn = True  # as released
        self.gradient: Tensor | None = None  # of the first update ever
        self.calls = (0, 0)  # of the network in the last iteration: in sampling, in training

    def step(self) -> None:
        trainer, before = self.trainer, self.model.calls
        prompts = trainer.task.draw_prompts(trainer.iteration)
        self.conditioning = self.model.encode([prompt["prompt"] for prompt in prompts] + [""])
        self.conditioning = self.conditioning.to(self.device)
        with torch.no_grad():
            moves = [move for slot, one in enumerate(prompts) for move in self.rollout(slot, one)]
        self.credit(moves)
        sampled = self.model.calls
        for share in torch.arange(len(prompts)).tensor_split(self.recipe.updates_per_rollout):
            slots = set(share.tolist())
            self.update([move for move in moves if move.slot in slots])
        self.calls, self.noise = (sampled - before, self.model.calls - sampled), None

    @abstractmethod
    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        """The trained steps of a prompt's samples, rewarded."""

    # ---- sampling ----

    def walk(
        self, x: Tensor, path: Sequence[Step], slot: int, members: Sequence[int], depth: int = 0
    ) -> tuple[list[Tensor], list[Move]]:
        """From x (B, *D) along a path: the states on the way, the last clean, and the moves."""
        states, moves, clean = [x], [], None
        for i, step in enumerate(path, depth):
            velocity, x = self.velocity(states[-1], step, slot), states[-1]
            before, clean = clean, (step.sigma, x - step.sigma * velocity)
            if step.order == 2:
                states.append(dpm_step(x, step, clean, before))
                continue
            mean, std = self.mean_and_std(velocity, x, step)
            states.append(mean + std * self.randn(slot, members, i))
            probability = log_prob(states[-1], mean, std)
            if step.is_trained:
                moves.append(Move(slot, step, x, states[-1], probability))
        return states, moves

    def velocity(self, x: Tensor, step: Step, slot: int) -> Tensor:
        """With guidance both halves go through the network together."""
        sigma, scale = torch.full((len(x),), step.sigma, device=self.device), self.guidance_scale
        if scale == 1:
            return self.model.velocity(x, sigma, self.conditioning[[slot] * len(x)])
        asked = [slot] * len(x) + [-1] * len(x)  # the last is the empty prompt
        both = torch.cat([x, x]), torch.cat([sigma, sigma]), self.conditioning[asked]
        conditional, uncond = self.model.velocity(*both).float().chunk(2)
        uncond = uncond if self.both_halves_learn else uncond.detach()
        return uncond + scale * (conditional - uncond)

    def mean_and_std(self, velocity: Tensor, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        shape = (len(x), 1, 1, 1)
        sigma, sigma_next = (torch.full(shape, s, device=self.device) for s in step[:2])
        level, dt = self.recipe.noise_level if step.is_drawn else 0.0, sigma_next - sigma
        g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_next, sigma))) * level
        mean = x * (1 + g**2 / (2 * sigma) * dt)
        mean = mean + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, g * torch.sqrt(-dt)

    def randn(self, slot: int, members: Sequence[int], i: int, stream: str = "step") -> Tensor:
        if self.noise is not None:
            return self.noise(slot, members, i, stream)
        return torch.randn(len(members), *self.model.latent_shape, device=self.device)

    def reward(self, latents: Tensor, prompt: dict) -> Tensor:
        """(B,): of images of one prompt."""
        images, metadata = self.model.decode(latents), [prompt] * len(latents)
        texts, rewards = [prompt["prompt"]] * len(latents), self.trainer.task.rewards
        weights = self.trainer.config.reward.weights
        found = (w * rewards[name](images, texts, metadata) for name, w in weights.items())
        return sum(found).cpu()

    # ---- training ----

    def credit(self, moves: list[Move]) -> None:
        """Advantages within groups; those of a sample's several images add up."""
        rule, rewards = self.recipe.credit(), torch.cat([move.rewards for move in moves])
        places = defaultdict(list)
        for place, key in enumerate(key for move in moves for key in move.groups):
            places[key].append(place)
        advantage = torch.empty_like(rewards)
        for place in places.values():
            group = rewards[place]
            std = (rewards if rule.global_std else group).std(0, correction=int(rule.unbiased))
            advantage[place] = (group - group.mean(0)) / (std + rule.eps)
        advantage = advantage.sum(1).clamp(-rule.limit, rule.limit).to(self.device)
        sizes = [len(move.groups) for move in moves]
        for move, part in zip(moves, advantage.split(sizes), strict=True):
            move.advantage = part

    def update(self, moves: list[Move]) -> None:
        """One optimizer step."""
        count = sum(len(move.advantage) for move in moves)
        for move in moves:
            (self.loss(move).sum() / count).backward()
        parameters = self.trainer.parameters
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in parameters])
        torch.nn.utils.clip_grad_norm_(parameters, self.trainer.config.train.max_grad_norm)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    def loss(self, move: Move) -> Tensor:
        coefficient, x = self.recipe.kl_coef, move.x.expand_as(move.x_next)
        velocity = self.velocity(move.x, move.step, move.slot).expand_as(x)
        mean, std = self.mean_and_std(velocity, x, move.step)
        new, clip = log_prob(move.x_next, mean, std), self.recipe.clip_range
        ratio, advantage = torch.exp(new - move.log_prob), move.advantage * move.weight
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        if coefficient:
            with torch.no_grad(), self.model.network.disable_adapter():
                velocity = self.velocity(move.x, move.step, move.slot).expand_as(x)
                anchor, _ = self.mean_and_std(velocity, x, move.step)
            loss = loss + coefficient * ((mean - anchor) ** 2 / (2 * std**2)).mean(dim=(1, 2, 3))
        is_clipped = (ratio - 1).abs() > clip
        figures = ratio, is_clipped.float(), 0.5 * (new - move.log_prob).square()
        self.statistics = [figure.mean().item() for figure in figures]
        return loss


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std)
    return (density - math.log(math.sqrt(2 * math.pi))).mean(dim=(1, 2, 3))


def dpm_step(x: Tensor, step: Step, clean, before) -> Tensor:
    """DPM-Solver++ (2M, midpoint); clean, before: (sigma, prediction) of this step, of the last."""

    def log_snr(sigma: float) -> float:
        return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf

    sigma, sigma_next = step[:2]
    if sigma_next == 0:
        return clean[1]
    h, prediction = log_snr(sigma_next) - log_snr(sigma), clean[1]
    if before is not None:
        ratio = (log_snr(sigma) - log_snr(before[0])) / h
        prediction = prediction + 0.5 * (clean[1] - before[1]) / ratio
    return sigma_next / sigma * x - (1 - sigma_next) * math.expm1(-h) * prediction


def chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


# ---- the algorithms ----


class FlowGRPO(PlainLoop):
    """Every sample from its own noise, every step drawn, all but the last trained."""

    def path(self) -> list[Step]:
        edges = pairwise(self.model.sigmas(self.recipe.num_inference_steps).tolist())
        return [Step(sigma, after, True, after > 0) for sigma, after in edges]

    def roots(self, slot: int) -> Tensor:
        return self.randn(slot, range(self.recipe.group_size), 0, "init")

    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        path, roots = self.path(), self.roots(slot)
        for members in chunks(range(self.recipe.group_size), self.batch_size):
            states, moves = self.walk(roots[list(members)], path, slot, members)
            rewards = self.reward(states[-1], prompt)[:, None]
            for move in moves:
                move.rewards, move.groups = rewards, [(slot, move.step.sigma)] * len(members)
                yield move


class MixGRPO(FlowGRPO):
    """One noise per prompt; every sample walks all of the way, before the window, too."""

    def path(self) -> list[Step]:
        recipe = self.recipe
        start = recipe.window_start(self.trainer.iteration, self.trainer.config.seed)
        stop, levels = start + recipe.window, recipe.levels(self.model.sigmas)
        tail, order = recipe.tail(self.model.sigmas, stop)
        path = []
        for i, edge in enumerate(pairwise([*levels[: stop + 1], *tail])):
            is_drawn = start <= i < stop
            path.append(Step(*edge, is_drawn, is_drawn, order if i >= stop else 1))
        return path

    def roots(self, slot: int) -> Tensor:
        return self.randn(slot, [0], 0, "init").repeat(self.recipe.group_size, 1, 1, 1)


class TempFlowGRPO(PlainLoop):
    """Trunks, and at each of their states branches, drawn and finished at once. In training the
    network is called with the state again for every branch.
    """

    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        recipe, size, steps = self.recipe, self.recipe.group_size, self.recipe.num_inference_steps
        euler = [Step(*edge) for edge in pairwise(self.model.sigmas(steps).tolist())]
        drawn = [step._replace(is_drawn=True, is_trained=True) for step in euler[:-1]]
        x = self.randn(slot, [0], 0)
        std = torch.cat([self.mean_and_std(x, x, step)[1].flatten() for step in drawn])
        weights = (std / std.mean()).tolist()
        for trunks in chunks(range(recipe.num_seeds), max(1, self.batch_size // size)):
            roots = [trunk * size for trunk in trunks]
            x = self.randn(slot, roots, 0, "init")
            for i, step in enumerate(drawn):
                velocity = self.velocity(x, step, slot)
                for part in chunks(range(size), min(size, self.batch_size)):
                    members = [root + k for root in roots for k in part]
                    each, v = (y.repeat_interleave(len(part), 0) for y in (x, velocity))
                    mean, std = self.mean_and_std(v, each, step)
                    x_next = mean + std * self.randn(slot, members, i)
                    move = Move(slot, step, each, x_next, log_prob(x_next, mean, std))
                    states, _ = self.walk(x_next, euler[i + 1 :], slot, members, i + 1)
                    move.rewards, move.weight = self.reward(states[-1], prompt)[:, None], weights[i]
                    move.groups = [(slot, root, i) for root in roots for _ in part]
                    yield move
                mean, std = self.mean_and_std(velocity, x, euler[i])
                x = mean + std * self.randn(slot, roots, i)
                log_prob(x, mean, std)


class G2RPO(PlainLoop):
    """One trunk; at each of its early states the network is called again for every branch, and
    every grid is walked to the end. In training the branches of a state share its call.
    """

    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        recipe, levels = self.recipe, self.recipe.levels(self.model.sigmas)
        edges = [Step(*edge) for edge in pairwise(levels)]
        trunk, _ = self.walk(self.randn(slot, [0], 0, "init"), edges, slot, [0])
        self.reward(trunk[-1], prompt)  # for the log alone
        for i in range(recipe.branch_steps):
            step, parts = edges[i]._replace(is_drawn=True, is_trained=True), []
            grids = [[levels[i + 1], *levels[i + 2 :: s][:-1], 0.0] for s in recipe.granularities]
            for members in chunks(range(recipe.group_size), self.batch_size):
                x = trunk[i].repeat(len(members), 1, 1, 1)
                (_, x_next), (move,) = self.walk(x, [step], slot, members, i)
                rewards = []
                for grid in grids:
                    path = [Step(*edge) for edge in pairwise(grid)]
                    states, _ = self.walk(x_next, path, slot, members, i + 1)
                    rewards.append(self.reward(states[-1], prompt))
                parts.append((move.x_next, move.log_prob, torch.stack(rewards, dim=1)))
            x_next, probability, rewards = map(torch.cat, zip(*parts, strict=True))
            groups = [(slot, i)] * recipe.group_size
            yield Move(slot, step, trunk[i], x_next, probability, groups, rewards)


LOOPS = {"flow_grpo": FlowGRPO, "mixgrpo": MixGRPO, "mixgrpo_flash": MixGRPO}
LOOPS |= {"tempflow_grpo": TempFlowGRPO, "g2rpo": G2RPO}
