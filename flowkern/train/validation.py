"""Held-out prompts: the same ones every time, from the same noise, without randomness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flowkern.checks import counted
from flowkern.models import Model, guide_of
from flowkern.rewards import RewardError
from flowkern.rollout import Guidance, Plan, Source, prompt_ids, run
from flowkern.rollout.engine import slices
from flowkern.rollout.moves import moved
from flowkern.rollout.states import ITERATION_BITS, OnHost
from flowkern.train import tracking
from flowkern.train.config import Config, ConfigError
from flowkern.train.data import prompts_of
from flowkern.train.distributed import seed_generators, together
from flowkern.train.prompts import Prompt
from flowkern.train.scoring import MEAN, KeyedReward, Scores, are_finite, require_drawn, score
from flowkern.train.stop import StopRequest

# Never a training rollout's: of validation, and of the sample command.
RESERVED_ITERATION, SAMPLE_ITERATION = 2**ITERATION_BITS - 1, 2**ITERATION_BITS - 2


def held_out(config: Config) -> list[Prompt]:
    """The prompts of a configuration's validation: none where it has no file of them."""
    return prompts_of(config.data, "test_prompts")[: config.validation.num_prompts]


def require_guidance(model: Model, scale: float, key: str) -> None:
    """Raise ConfigError where a model that takes no guidance is to be guided."""
    if model.guidance.kind == "none" and scale > 1:
        raise ConfigError(f"{key}: got {scale}, expected at most 1: this model takes no guidance")


@dataclass(frozen=True)
class Sampler:
    """How images are drawn; the deterministic way by default."""

    num_inference_steps: int
    guidance_scale: float = 1.0
    kind: str = "ode"
    """As in `schedules`, with its noise level."""
    noise_level: float = 0.0


class Validation:
    """The held-out prompts of a configuration, scored and drawn; rank r takes every world-th."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: Any,
        rewards: Mapping[str, KeyedReward],
        prompts: Sequence[Prompt],
        stop: StopRequest,
    ) -> None:
        self.config, self.accelerator, self.stop = config, accelerator, stop
        self.model, self.rewards, self.prompts = model, rewards, prompts
        rank, world = accelerator.process_index, accelerator.num_processes
        self.places = range(rank, len(prompts), world)
        self._drawn = list(self.places)
        """Those, and where the network is split the first once more, so that all ranks make the
        same calls."""
        if config.train.sharding is not None:
            self._drawn += [0] * (-(-len(prompts) // world) - len(self._drawn))

    @property
    def mine(self) -> list[Prompt]:
        """Those that this rank draws."""
        return [self.prompts[place] for place in self._drawn]

    def run(self, step: int) -> dict[str, float]:
        """Draw and score them: writes samples/step-N.png; returns the means, on the main process,
        each of the images that have it, and nothing where there are no prompts.

        Raises RewardError as `scoring.score` does, naming the step.
        """
        if not self.prompts:
            return {}
        world = self.accelerator.num_processes
        seed_generators(self.config.seed, RESERVED_ITERATION, self.accelerator.process_index)
        try:
            found = together(self.accelerator, lambda: self._sample() if self._drawn else None)
        except RewardError as error:
            raise RewardError(f"validation after step {step}: {error}") from error
        if not self.accelerator.is_main_process:
            return {}
        images, scores = zip(*filter(None, found), strict=True)
        order = torch.arange(len(self.prompts))
        order = torch.cat([order[first::world] for first in range(world)]).argsort()
        return self._write(step, torch.cat(images)[order], Scores.joined(scores).at(order))

    def _sample(self) -> tuple[Tensor, Scores] | None:
        """What is shown of this rank's images, and their scores, on the host."""
        options, prompts = self.config.validation, self.mine
        device, max_batch = self.accelerator.device, self.config.train.max_batch
        latents = sample_latents(
            self.model,
            [prompt["prompt"] for prompt in prompts],
            moved(prompt_ids(RESERVED_ITERATION, torch.tensor(self._drawn)), device),
            Sampler(options.num_inference_steps, options.guidance_scale),
            seed=self.config.seed,
            max_batch=max_batch,
            poll=self.stop.poll,
        )[: len(self.places)]
        if not self.places:
            return None
        shown = []

        def decoded(part: slice) -> tuple[Tensor, list[dict[str, Any]]]:
            images = self.model.decode(latents[part])
            shown.append(tracking.few_frames(images).cpu())
            return images, prompts[part]

        batches = map(decoded, slices(len(latents), max_batch))
        # A prompt has one image here: a reward of groups has nothing to compare it with.
        alone = {name: reward for name, reward in self.rewards.items() if not reward.by_group}
        asked = alone if any(one.weight for one in alone.values()) else self.rewards
        scores = score(asked, batches, self.stop.in_reward)
        return torch.cat(shown), scores

    def _write(self, step: int, images: Tensor, scores: Scores) -> dict[str, float]:
        directory, means = Path(self.config.output_dir), scores.means()
        mean, failed = means[f"reward/{MEAN}"], scores.failed()[MEAN]
        of = f"{len(images) - failed} of {len(images)}" if failed else len(images)
        after = counted(step, "optimizer step")
        shown = images[: self.config.validation.num_images]
        tracking.save_grid(
            directory / "samples" / f"step-{step}.png",
            shown,
            [prompt["prompt"] for prompt in self.prompts[: len(shown)]],
            scores.rewards[MEAN][: len(shown)].tolist(),
            f"held-out prompts after {after}, mean reward {mean:.2f} over {of}",
        )
        return means


def sample_images(model: Any, prompts: Sequence[str], *arguments: Any, **options: Any) -> Tensor:
    """One image per prompt, (B, 3, H, W) in [0, 1], or a video (B, F, 3, H, W); of the arguments of
    `sample_latents`. Raises RewardError as `scoring.require_drawn`.
    """
    images = model.decode(sample_latents(model, prompts, *arguments, **options))
    require_drawn(are_finite(images), prompts)
    return images


@torch.no_grad()
def sample_latents(
    model: Any,
    prompts: Sequence[str],
    sample_id: Tensor,
    sampler: Sampler,
    *,
    seed: int,
    max_batch: int = 16,
    poll: Callable[[], None] = lambda: None,
    at: Callable[[float], None] = lambda sigma: None,
) -> Tensor:
    """One latent per prompt, (B, *D); sample_id (B,) picks the noise.

    poll: called before every batch of network calls; may raise. at: the same, with their noise
    level.
    """
    conditioning = model.encode([*prompts, model.guidance.negative_prompt]).to(sample_id.device)
    plan, kind, level = Plan(), sampler.kind, sampler.noise_level
    node = plan.root(0)
    for sigma in model.sigmas(sampler.num_inference_steps).tolist()[1:]:
        if kind == "ode" or level == 0:
            node = plan.step(node, sigma)
        else:
            node = plan.draw(node, sigma, kind, level, 0)
    plan.leaf(node)

    def velocity(x_t: Tensor, sigma: Tensor, prompt: Tensor, on_host: OnHost) -> Tensor:
        poll()
        at(float(on_host.sigma[0]))  # one of all rows: no prompt is ahead of another
        return model.velocity(
            x_t, sigma, conditioning.rows(prompt, on_host.prompt), sigma_host=on_host.sigma
        )

    rollout = run(
        plan,
        velocity,
        Source(seed, sample_id, model.latent_shape),
        max_batch,
        guidance=Guidance.of(sampler.guidance_scale, len(prompts), guide_of(model)),
    )
    return rollout.latents.flatten(0, 1)
