"""What the loops of plain_loops.py and plain_matching.py share: an iteration in plain PyTorch.

Every sample is walked from noise to image, with as many others of its prompt as `batch_size` says;
nothing that samples have in common is shared unless the released loop shares it. A step is the
published formula, operation by operation. It is taken in full where it is deterministic, too: a
noise is drawn that counts for nothing, and a log-probability thrown away. Model, rewards, copies of
the weights and optimizer are those of the trainer it is compared with.

B samples of a move, R network calls that it takes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flowkern.models.wan import Wan

Noise = Callable[[int, Sequence[int], int, str], Tensor]
"""(slot of the prompt, member of each sample, step, "init" | "step" | "match") -> (B, *D)"""


class Step(NamedTuple):
    sigma: float
    sigma_next: float
    is_drawn: bool = False
    is_trained: bool = False
    order: int = 1  # 2: DPM-Solver++, with the clean prediction of the step before


@dataclass
class Move:
    """A trained step of samples that went together, or the images they are (step None)."""

    slot: int
    step: Step | None
    x: Tensor  # (R, *D); R is B, or 1 where all left one state; images
    x_next: Tensor | None = None  # (B, *D)
    log_prob: Tensor | None = None  # (B,)
    mean: Tensor | None = None  # (B, *D): of x_next
    members: Sequence[int] = ()  # (B,)
    groups: list[Any] | None = None  # (B,): samples with the same key are compared
    rewards: Tensor | None = None  # (B, Q): of every image that a sample ends in
    advantage: Tensor | None = None  # (B,)
    weight: float = 1.0


class PlainLoop(ABC):
    """`step()` does what the trainer's `step()` does. A subclass says how a prompt is sampled."""

    released_batch: ClassVar[Mapping[str, int]] = MappingProxyType({})
    """Samples that go together in the released loop, by the model's class; of others 1."""

    def __init__(self, trainer, batch_size: int, noise: Noise | None = None):
        """noise: of the first iteration; None: torch.randn, as in all that follow."""
        self.trainer, self.batch_size, self.noise = trainer, batch_size, noise
        self.recipe, self.model, self.device = trainer.recipe, trainer.task.model, trainer.device
        self.guidance_scale = trainer.recipe.guidance_scale
        self.kind = getattr(self.recipe, "sde_type", "flow_sde")
        if self.kind not in ("flow_sde", "dance_sde", "cps"):
            raise ValueError(f"sde_type: the plain loop has no {self.kind}")
        self.learns_both_halves = getattr(self.recipe, "uncond_gradient", False)
        self.gradient: Tensor | None = None  # of the first update ever
        self.calls = (0, 0)  # of the network in the last iteration: in sampling, in training
        self.ratios: list[float] = []  # of the last iteration's batches
        self._is_sampling = False

    @property
    def rows(self) -> tuple[int, int]:
        """Of a full network call in sampling, and in training."""
        halves = 1 if self.guidance_scale <= 1 else 2
        return halves * self.batch_size, halves * self.batch_size

    def step(self) -> None:
        trainer, before = self.trainer, self.model.calls
        prompts = trainer.task.draw_prompts(trainer.iteration)
        texts = [prompt["prompt"] for prompt in prompts]
        found = self.model.encode([*texts, self.model.guidance.negative_prompt])
        self.conditioning, self.ratios = found.to(self.device), []
        self._is_sampling = True
        with torch.no_grad(), trainer.weights.using(self.recipe.sampler):
            moves = [move for slot, one in enumerate(prompts) for move in self.rollout(slot, one)]
        self._is_sampling = False
        self.credit(moves)
        sampled = self.model.calls
        for share in torch.arange(len(prompts)).tensor_split(self.recipe.updates_per_rollout):
            slots = set(share.tolist())
            self.update([move for move in moves if move.slot in slots])
        for name, decay in self.recipe.copies.items():
            trainer.copies.update(name, decay(trainer.iteration + 1))
        self.calls, self.noise = (sampled - before, self.model.calls - sampled), None

    @abstractmethod
    def rollout(self, slot: int, prompt: dict) -> Iterator[Move]:
        """The trained steps of a prompt's samples, or its images; rewarded."""

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
            probability = self.log_prob(states[-1], mean, std)
            if step.is_trained:
                moves.append(Move(slot, step, x, states[-1], probability, mean))
        return states, moves

    def velocity(self, x: Tensor, step: Step, slot: int) -> Tensor:
        """With guidance both halves go through the network together, backward too; the one without
        a prompt is detached behind it. Wan's rollout asks for one after the other."""
        sigma, scale = torch.full((len(x),), step.sigma, device=self.device), self.guidance_scale
        prompts, none = [slot] * len(x), [-1] * len(x)  # the last is the empty prompt
        if scale <= 1:
            return self.ask(x, sigma, prompts)
        if self._is_sampling and isinstance(self.model, Wan):
            conditional, uncond = self.ask(x, sigma, prompts), self.ask(x, sigma, none)
        else:
            both = torch.cat([x, x]), torch.cat([sigma, sigma])
            conditional, uncond = self.ask(*both, prompts + none).chunk(2)
        uncond = uncond if self.learns_both_halves else uncond.detach()
        return uncond + scale * (conditional - uncond)

    def ask(self, x: Tensor, sigma: Tensor, prompts: list[int]) -> Tensor:
        return self.model.velocity(x, sigma, self.conditioning[prompts]).float()

    def levels(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """(R, 1, ...) each: of the step's ends."""
        shape = (len(x), *[1] * (x.ndim - 1))
        return tuple(torch.full(shape, sigma, device=self.device) for sigma in step[:2])

    def mean_and_std(self, velocity: Tensor, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        sigma, sigma_next = self.levels(x, step)
        level, dt = self.recipe.noise_level if step.is_drawn else 0.0, sigma_next - sigma
        if self.kind == "cps":
            std = sigma_next * math.sin(level * math.pi / 2)
            clean, noise = x - sigma * velocity, x + (1 - sigma) * velocity
            return clean * (1 - sigma_next) + noise * torch.sqrt(sigma_next**2 - std**2), std
        g = torch.full_like(sigma, level)
        if self.kind == "flow_sde":
            g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_next, sigma))) * level
        mean = x * (1 + g**2 / (2 * sigma) * dt)
        mean = mean + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, g * torch.sqrt(-dt)

    def log_prob(self, x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """(B,): over elements the mean."""
        density = -((x_next - mean) ** 2)
        if self.kind != "cps":
            density = density / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        return density.flatten(1).mean(1)

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
        advantage = advantage.sum(1).clamp(-rule.limit, rule.limit).to(self.device) * rule.scale
        sizes = [len(move.groups) for move in moves]
        for move, part in zip(moves, advantage.split(sizes), strict=True):
            move.advantage = part

    def update(self, moves: list[Move]) -> None:
        """One optimizer step."""
        for loss in self.losses(moves):
            loss.backward()
        trainer = self.trainer
        parameters = trainer.parameters
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in parameters])
        torch.nn.utils.clip_grad_norm_(parameters, trainer.config.train.max_grad_norm)
        trainer.optimizer.step()
        trainer.copies.weights_moved()
        trainer.optimizer.zero_grad()

    @abstractmethod
    def losses(self, moves: list[Move]) -> Iterator[Tensor]:
        """Of batch after batch: together the loss of an optimizer step."""


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
