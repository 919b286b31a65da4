"""The plain loops of AWM and DiffusionNFT: the forward process over the images, matched in the
released code's float64.

Noise levels are those of flowkern's plan, and each has its noise for the whole iteration. Without
guidance, which both released loops sample without, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import ClassVar

import torch
from plain_loop import Move, PlainLoop, Step, chunks
from torch import Tensor


class MatchingLoop(PlainLoop):
    """Images of a walk; K noise levels of each to match at."""

    def path(self) -> list[Step]:
        *first, before, last, end = self.model.sigmas(self.recipe.num_inference_steps).tolist()
        last = max(last, before * self.recipe.last_sigma_ratio)
        edges = pairwise([*first, before, last, end])
        return [self.walked(Step(*edge)) for edge in edges]

    def walked(self, step: Step) -> Step:
        """How the rollout takes it."""
        return step._replace(order=2)

    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        path, size = self.path(), self.recipe.group_size
        roots = self.randn(slot, range(size), 0, "init")
        for members in chunks(range(size), self.batch_size):
            x0 = self.walk(roots[list(members)], path, slot, members)[0][-1]
            groups, rewards = [slot] * len(members), self.reward(x0, prompt)[:, None]
            yield Move(slot, None, x0, members=members, groups=groups, rewards=rewards)

    def points(self, moves: list[Move], size: int) -> Iterator[tuple[Tensor, ...]]:
        """Of so many samples after each other: x0 (B, *D), advantage (B,), sigma (B, K), noise
        (K, B, *D), slot (B,)."""
        trainer = self.trainer
        plan = self.recipe.plan(self.model.sigmas, trainer.iteration, trainer.config.seed)
        count = len(plan.points) // self.recipe.group_size
        levels = torch.tensor([sigma for _, sigma in plan.points], device=self.device)
        levels = levels.view(-1, count)
        for move in moves:
            for part in chunks(range(len(move.x)), size):
                members = [move.members[place] for place in part]
                noise = [
                    torch.cat([self.randn(move.slot, [m], m * count + j, "match") for m in members])
                    for j in range(count)
                ]
                of = list(part)
                yield move.x[of], move.advantage[of], levels[members], noise, [move.slot] * len(of)

    def anchor(self, name: str, x: Tensor, sigma: Tensor, slots: list[int]) -> Tensor:
        with torch.no_grad(), self.trainer.weights.using(name):
            return self.ask(x, sigma, slots)


def wide(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.double().view(-1, *[1] * (x.ndim - 1))


def mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


class AWM(MatchingLoop):
    """All levels of a few samples in one call, three times: with the weights that learn, the
    reference and the copy that trails."""

    released_batch: ClassVar[Mapping[str, int]] = {"SD3": 6, "Flux": 6, "Wan": 6}

    @property
    def samples(self) -> int:
        """Of a batch of training: half as many as in sampling."""
        return max(1, self.batch_size // 2)

    @property
    def rows(self) -> tuple[int, int]:
        return self.batch_size, self.samples * self.recipe.num_train_timesteps

    def walked(self, step: Step) -> Step:
        is_drawn = self.recipe.noise_level > 0 and 0.3 <= step.sigma <= 0.9
        return step._replace(is_drawn=True) if is_drawn else super().walked(step)

    def losses(self, moves: list[Move]) -> Iterator[Tensor]:
        recipe, total = self.recipe, sum(len(move.x) for move in moves)
        for x0, advantage, sigma, noise, slots in self.points(moves, self.samples):
            count = sigma.shape[1]
            x0, e = x0.double().repeat_interleave(count, 0), torch.stack(noise, 1).flatten(0, 1)
            t, slots = sigma.flatten(), [slot for slot in slots for _ in range(count)]
            x_t = ((1 - wide(t, x0)) * x0 + wide(t, x0) * e.double()).float()
            v = self.ask(x_t, t, slots).double()
            v_ref, v_ema = (self.anchor(n, x_t, t, slots).double() for n in ("reference", "ema"))
            target = e.double() - x0
            new, *_ = (self.likelihood(each, target, t) for each in (v, v_ref, v_ema))
            ratio, a = torch.exp(new - new.detach()), advantage.repeat_interleave(count)
            loss = torch.maximum(-a * ratio, -a * ratio.clamp(0, 2))
            for v_old, coef, kind in (
                (v_ref, recipe.ref_coef, recipe.kl_weight),
                (v_ema, recipe.ema_coef, recipe.kl_ema_weight),
            ):
                std2 = 0.7**2 * t / (1 - t.clamp(max=0.99))
                distance = mean((v - v_old) ** 2)
                loss = loss + coef * (distance / (2 * std2) if kind == "elbo" else distance)
            self.ratios.append(ratio.mean().item())
            yield loss.sum() / (total * count)

    def likelihood(self, v: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """What stands for it: -(t / p) (M^p - eps^p) for "ghuber"."""
        m, eps = mean((v - target) ** 2), torch.tensor(1e-10, device=self.device)
        p, weighting = self.recipe.ghuber_power, self.recipe.weighting
        if weighting == "ghuber":
            return -t / p * ((m + eps) ** p - eps**p)
        if weighting == "huber":
            return -t * (torch.sqrt(m + eps) - 1e-5)
        return {"uniform": -m, "t": -t * m, "t2": -(t**2) * m}[weighting]


class DiffusionNFT(MatchingLoop):
    """A level of each sample after another, three calls each: with the old policy, the reference
    and the weights that learn."""

    released_batch: ClassVar[Mapping[str, int]] = {"SD3": 9, "Flux": 9, "Wan": 9}

    def losses(self, moves: list[Move]) -> Iterator[Tensor]:
        recipe, total = self.recipe, sum(len(move.x) for move in moves)
        for x0, advantage, sigma, noise, slots in self.points(moves, self.batch_size):
            count, r = sigma.shape[1], (0.5 + advantage / 2).clamp(0, 1)
            for t, e in zip(sigma.unbind(1), noise, strict=True):
                level = wide(t, x0).float()
                x_t = (1 - level) * x0 + level * e
                v_old, v_ref = (self.anchor(n, x_t, t, slots) for n in ("old", "reference"))
                v = self.ask(x_t, t, slots)
                b = recipe.nft_beta
                towards, away = b * v + (1 - b) * v_old, (1 + b) * v_old - b * v
                loss = r * self.matched(towards, x_t, x0, level)
                loss = loss + (1 - r) * self.matched(away, x_t, x0, level)
                loss = recipe.adv_clip_max / b * loss + recipe.ref_coef * mean((v - v_ref) ** 2)
                yield loss.sum() / (total * count)

    def matched(self, v: Tensor, x_t: Tensor, x0: Tensor, level: Tensor) -> Tensor:
        """The squared error of the clean prediction, by its mean size."""
        error = (x_t - level * v) - x0
        if self.recipe.weighting == "uniform":
            return mean(error**2)
        with torch.no_grad():
            weight = mean(error.double().abs()).clamp(min=1e-5)
        return mean(error**2 / wide(weight, error))
