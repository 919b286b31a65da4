"""One training iteration of each algorithm in plain PyTorch, call for call as the released loops.

Training visits what was walked together, step by step, and reads its statistics on the host each
time. Where a released loop does what flowkern does not (a solver of another kind, a choice that
differs by rank) this one does as flowkern, in as many calls as released: the images are the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import ClassVar

import torch
from plain_loop import Move, PlainLoop, Step, chunks
from plain_matching import AWM, DiffusionNFT
from torch import Tensor

from flowkern.rl.recipe import shared_random

FLOW_GRPO: Mapping[str, int] = MappingProxyType({"SD3": 9, "Flux": 3, "Wan": 8})


class PolicyLoop(PlainLoop):
    """The clipped ratio, with a KL to the reference where the recipe has one."""

    def losses(self, moves: list[Move]) -> Iterator[Tensor]:
        count = sum(len(move.advantage) for move in moves)
        for move in moves:
            yield self.loss(move).sum() / count

    def loss(self, move: Move) -> Tensor:
        coefficient, x = self.recipe.kl_coef, move.x.expand_as(move.x_next)
        velocity = self.velocity(move.x, move.step, move.slot).expand_as(x)
        mean, std = self.mean_and_std(velocity, x, move.step)
        new, clip = self.log_prob(move.x_next, mean, std), self.recipe.clip_range
        ratio, advantage = self.ratio(move, new, mean, std), move.advantage * move.weight
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        if coefficient:
            with torch.no_grad(), self.trainer.weights.using("reference"):
                velocity = self.velocity(move.x, move.step, move.slot).expand_as(x)
                anchor, _ = self.mean_and_std(velocity, x, move.step)
            loss = loss + coefficient * ((mean - anchor) ** 2 / (2 * std**2)).flatten(1).mean(1)
        is_clipped = (ratio - 1).abs() > clip
        figures = ratio, is_clipped.float(), 0.5 * (new - move.log_prob).square()
        mean_ratio, *_ = (figure.mean().item() for figure in figures)
        self.ratios.append(mean_ratio)
        return loss

    def ratio(self, move: Move, new: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return torch.exp(new - move.log_prob)


class LooksUp(PolicyLoop):
    """Flow-GRPO's scripts find each sample's level among the grid's, on the device, and wait."""

    released_batch: ClassVar[Mapping[str, int]] = FLOW_GRPO

    @cached_property
    def grid(self) -> Tensor:
        return self.model.sigmas(self.recipe.num_inference_steps).to(self.device, torch.float32)

    def levels(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        grid = self.grid
        # In sampling one stands for all.
        asked = torch.full((1 if self._is_sampling else len(x),), step.sigma, device=self.device)
        place = [(grid == sigma).nonzero()[0].item() for sigma in asked]
        grid[1].item()
        after = [i + 1 for i in place]
        return tuple(grid[at].expand(len(x)).view(-1, *[1] * (x.ndim - 1)) for at in (place, after))


# ---- the algorithms ----


class Samples(PolicyLoop):
    """Each walks a path of its own, from its own noise."""

    @abstractmethod
    def path(self) -> list[Step]: ...

    def roots(self, slot: int) -> Tensor:
        return self.randn(slot, range(self.recipe.group_size), 0, "init")

    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        path, roots = self.path(), self.roots(slot)
        for members in chunks(range(self.recipe.group_size), self.batch_size):
            states, moves = self.walk(roots[list(members)], path, slot, members)
            rewards = self.reward(states[-1], prompt)[:, None]
            for place, move in enumerate(moves):  # of every sample as many: its place is the key
                move.rewards, move.groups = rewards, [(slot, place)] * len(members)
                yield move


class OneNoise(Samples):
    """From one noise per prompt, one sample at a time."""

    def roots(self, slot: int) -> Tensor:
        root = self.randn(slot, [0], 0, "init")
        return root.repeat(self.recipe.group_size, *[1] * (root.ndim - 1))


class FlowGRPO(LooksUp, Samples):
    """Every step is drawn, all but the last trained."""

    def path(self) -> list[Step]:
        edges = pairwise(self.model.sigmas(self.recipe.num_inference_steps).tolist())
        return [Step(sigma, after, True, after > 0) for sigma, after in edges]


class FlowGRPOFast(FlowGRPO):
    """Drawn and trained in a window alone; every sample walks all of the way."""

    def path(self) -> list[Step]:
        recipe, trainer = self.recipe, self.trainer
        start = recipe.window_start(trainer.iteration, trainer.config.seed)
        window, path = range(start, start + recipe.num_drawn), super().path()
        return [
            step._replace(is_drawn=i in window, is_trained=i in window)
            for i, step in enumerate(path)
        ]


class GRPOGuard(FlowGRPO):
    """The ratio without its bias, and every step's loss by its own length."""

    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        for move in super().rollout(slot, prompt):
            move.weight = 1 / (move.step.sigma - move.step.sigma_next)
            yield move

    def ratio(self, move: Move, new: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        bias = ((mean - move.mean) ** 2).flatten(1).mean(1) / (2 * std.mean() ** 2)
        return torch.exp((new - move.log_prob + bias) * std.mean())


class DanceGRPO(OneNoise):
    """Each sample is trained on its own part of its steps."""

    def path(self) -> list[Step]:
        *edges, last = pairwise(self.recipe.levels(self.model.sigmas))
        return [*(Step(*edge, is_drawn=True) for edge in edges), Step(*last)]

    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        recipe, trainer, path = self.recipe, self.trainer, self.path()
        chance, roots = shared_random(trainer.config.seed, trainer.iteration), self.roots(slot)
        for member in range(recipe.group_size):
            trained = chance.sample(range(len(path) - 1), recipe.num_trained)
            own = [step._replace(is_trained=i in trained) for i, step in enumerate(path)]
            states, moves = self.walk(roots[[member]], own, slot, [member])
            rewards = self.reward(states[-1], prompt)[:, None]
            for place, move in enumerate(moves):
                move.rewards, move.groups = rewards, [(slot, place)]
                yield move


class MixGRPO(OneNoise):
    """Every sample walks all of the way, before the window, too."""

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


class TempFlowGRPO(LooksUp):
    """Trunks, and at each of their states branches, drawn and finished at once. In training the
    network is called with the state again for every branch.
    """

    released_batch: ClassVar[Mapping[str, int]] = dict.fromkeys(FLOW_GRPO, 6)  # of one trunk

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
                    move = Move(slot, step, each, x_next, self.log_prob(x_next, mean, std))
                    states, _ = self.walk(x_next, euler[i + 1 :], slot, members, i + 1)
                    move.rewards, move.weight = self.reward(states[-1], prompt)[:, None], weights[i]
                    move.groups = [(slot, root, i) for root in roots for _ in part]
                    yield move
                mean, std = self.mean_and_std(velocity, x, euler[i])
                x = mean + std * self.randn(slot, roots, i)
                self.log_prob(x, mean, std)


class G2RPO(PolicyLoop):
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
                x = trunk[i].repeat(len(members), *[1] * (trunk[i].ndim - 1))
                (_, x_next), (move,) = self.walk(x, [step], slot, members, i)
                rewards = []
                for grid in grids:
                    path = [Step(*edge) for edge in pairwise(grid)]
                    states, _ = self.walk(x_next, path, slot, members, i + 1)
                    rewards.append(self.reward(states[-1], prompt))
                parts.append((move.x_next, move.log_prob, torch.stack(rewards, dim=1)))
            x_next, probability, rewards = map(torch.cat, zip(*parts, strict=True))
            groups = [(slot, i)] * recipe.group_size
            yield Move(slot, step, trunk[i], x_next, probability, groups=groups, rewards=rewards)


LOOPS: dict[str, type[PlainLoop]] = {
    "flow_grpo": FlowGRPO, "flow_grpo_fast": FlowGRPOFast, "grpo_guard": GRPOGuard,
    "dance_grpo": DanceGRPO, "mixgrpo": MixGRPO, "mixgrpo_flash": MixGRPO,
    "mixgrpo_flash_star": MixGRPO, "tempflow_grpo": TempFlowGRPO, "g2rpo": G2RPO,
    "awm": AWM, "diffusion_nft": DiffusionNFT,
}  # fmt: skip
