"""One Flow-GRPO training step in plain PyTorch, arranged the way the released scripts arrange it.

A batch is sampled to the end before the next one starts; every step looks its index up by timestep
and computes the published formula operation by operation; training visits the batches and their
timesteps one by one, with the ratio as the exponential of a difference of log-probabilities, and
reads its statistics on the host each time. The model, the rewards and the optimizer are those of
the trainer it is compared with.
"""

from __future__ import annotations

import math

import torch


class PlainTrainingStep:
    """`step()` does what the trainer's `step()` does, on the same prompts and weights."""

    def __init__(self, trainer, batch_size: int, noise=None):
        self.trainer, self.batch_size, self.noise = trainer, batch_size, noise
        self.recipe, self.model = trainer.recipe, trainer.model
        self.model.network = trainer.network
        self.sigmas = _sd3_sigmas(self.recipe.num_inference_steps, self.model.shift)
        self.timesteps = self.sigmas[:-1] * 1000

    def step(self) -> float:
        prompts = [
            row for row in self.trainer.draw_prompts() for _ in range(self.recipe.group_size)
        ]
        batches = [
            prompts[i : i + self.batch_size] for i in range(0, len(prompts), self.batch_size)
        ]
        samples = [self._sample(rows, i * self.batch_size) for i, rows in enumerate(batches)]
        rewards = torch.cat([s["reward"] for s in samples])
        groups = rewards.reshape(-1, self.recipe.group_size)
        advantages = (groups - groups.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
        advantages = advantages.clamp(-5, 5).flatten().split(self.batch_size)
        self.gradient, share = None, len(samples) // self.recipe.updates_per_rollout
        for first in range(0, len(samples), share):
            self._update(list(zip(samples, advantages, strict=True))[first : first + share])
        return rewards.mean().item()

    def _update(self, batches):
        """One optimizer step over whole batches, timestep by timestep."""
        count = len(batches) * (len(self.timesteps) - 1)  # the last step is not trained
        for sample, advantage in batches:
            for j in range(len(self.timesteps) - 1):
                (self._loss(sample, advantage, j) / count).backward()
        parameters = self.trainer.parameters
        self.gradient = self.gradient or [p.grad.clone() for p in parameters]
        torch.nn.utils.clip_grad_norm_(parameters, self.trainer.config.train.max_grad_norm)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    @torch.no_grad()
    def _sample(self, rows, first):
        model = self.model
        conditioning = model.encode([row["prompt"] for row in rows])
        shape = (len(rows), *model.latent_shape())
        latents = [self._randn(shape, "init", 0, first)]
        log_probs = []
        for i, t in enumerate(self.timesteps):
            velocity = model.velocity(latents[-1], (t / 1000).expand(len(rows)), conditioning)
            x_next, log_prob = self._sde_step(
                velocity, t.expand(len(rows)), latents[-1], i=i, first=first
            )
            latents.append(x_next)
            log_probs.append(log_prob)
        images = model.decode(latents[-1])
        prompts = [row["prompt"] for row in rows]
        weights = self.trainer.config.reward.weights
        scores = {
            name: reward(images, prompts, rows) for name, reward in self.trainer.rewards.items()
        }
        reward = sum(weight * scores[name] for name, weight in weights.items())
        return {
            "latents": latents,
            "log_probs": log_probs,
            "conditioning": conditioning,
            "reward": reward,
        }

    def _loss(self, sample, advantage, j):
        t = self.timesteps[j].expand(len(advantage))
        velocity = self.model.velocity(sample["latents"][j], t / 1000, sample["conditioning"])
        _, log_prob = self._sde_step(velocity, t, sample["latents"][j], sample["latents"][j + 1])
        ratio = torch.exp(log_prob - sample["log_probs"][j])
        clip = self.recipe.clip_range
        loss = torch.maximum(
            -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
        ).mean()
        self.statistics = {
            "ratio": ratio.mean().item(),
            "clipfrac": ((ratio - 1).abs() > clip).float().mean().item(),
            "approx_kl": 0.5 * (log_prob - sample["log_probs"][j]).square().mean().item(),
        }
        return loss

    def _sde_step(self, velocity, timestep, x, x_next=None, i=0, first=0):
        """The published step: look-ups per sample, then the formula operation by operation."""
        index = [int((self.timesteps == t).nonzero()[0]) for t in timestep]
        shape = (-1, *[1] * (x.ndim - 1))
        sigma = self.sigmas[index].view(shape)
        sigma_next = self.sigmas[[k + 1 for k in index]].view(shape)
        sigma_max = self.sigmas[1].item()
        dt = sigma_next - sigma
        g = (
            torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma)))
            * self.recipe.noise_level
        )
        mean = (
            x * (1 + g**2 / (2 * sigma) * dt)
            + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        )
        std = g * torch.sqrt(-dt)
        if x_next is None:
            x_next = mean + std * self._randn(x.shape, "step", i, first)
        log_prob = (
            -((x_next.detach() - mean) ** 2) / (2 * std**2)
            - torch.log(std)
            - math.log(math.sqrt(2 * math.pi))
        )
        return x_next, log_prob.mean(dim=tuple(range(1, x.ndim)))

    def _randn(self, shape, stream, i, first):
        return torch.randn(shape) if self.noise is None else self.noise(shape, stream, i, first)


def _sd3_sigmas(num_steps: int, shift: float) -> torch.Tensor:
    """As diffusers sets them: sigma_min shifted when made, the grid shifted when set."""
    u = torch.linspace(1, shift * 1e-3 / (1 + (shift - 1) * 1e-3), num_steps, dtype=torch.float64)
    return torch.cat(
        [shift * u / (1 + (shift - 1) * u), torch.zeros(1, dtype=torch.float64)]
    ).float()
