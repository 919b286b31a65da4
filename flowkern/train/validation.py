"""Held-out prompts: the same ones every time, from the same noise, without randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from flowkern.rewards import Reward
from flowkern.rollout import Guidance, Plan, Source, prompt_ids, run
from flowkern.rollout.engine import ITERATION_BITS, moved
from flowkern.train import durable, tracking
from flowkern.train.config import Config
from flowkern.train.distributed import seed_generators
from flowkern.train.errors import RunError
from flowkern.train.prompts import read_prompts
from flowkern.train.stop import Stop, StopRequest

Part = tuple[int, Tensor, dict[str, float]]
"""A held-out prompt's place, its image (3, H, W), its scores."""

# Never a training rollout's: of validation, and of the sample command.
RESERVED_ITERATION, SAMPLE_ITERATION = 2**ITERATION_BITS - 1, 2**ITERATION_BITS - 2


class Validation:
    """The held-out prompts of a configuration, scored and drawn; rank r takes every world-th."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: Any,
        rewards: Mapping[str, Reward],
        stop: StopRequest,
    ) -> None:
        self.config, self.accelerator, self.stop = config, accelerator, stop
        self.model, self.rewards = model, rewards
        path, count = config.data.test_prompts, config.validation.num_prompts
        self.rows = read_prompts(path)[:count] if path else []

    def run(self, step: int) -> None:
        """Write samples/step-N.png and append a line to validation.jsonl.

        Raises FloatingPointError for a reward that is not finite.
        """
        if not self.rows:
            return
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        seed_generators(self.config.seed, RESERVED_ITERATION, rank)
        mine = [i for i in range(len(self.rows)) if i % world == rank]
        failure, parts = None, []
        try:
            images, scores = self._sample(mine) if mine else (None, {})
            parts = [(i, images[j], {n: scores[n][j] for n in scores}) for j, i in enumerate(mine)]
        except Stop:
            raise
        except BaseException as raised:
            if world == 1:
                raise
            failure = raised
        if world > 1:
            everyone = gather_object([(failure is None, parts)])
            if failure is not None:
                raise failure
            failed = [rank for rank, (is_fine, _) in enumerate(everyone) if not is_fine]
            if failed:
                raise RunError(f"process {failed[0]} failed in validation, and says how")
            parts = [part for _, theirs in everyone for part in theirs]
        means = self._means(step, parts)
        if self.accelerator.is_main_process:
            self._write(step, sorted(parts, key=lambda part: part[0]), means)

    def _means(self, step: int, parts: Sequence[Part]) -> dict[str, float]:
        means = {
            f"reward/{name}": sum(scores[name] for _, _, scores in parts) / len(parts)
            for name in parts[0][2]
        }
        for name, value in means.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"validation after step {step}: the mean of {name} over {len(parts)} prompts "
                    f"is {value}"
                )
        return means

    def _sample(self, mine: list[int]) -> tuple[Tensor, dict[str, list[float]]]:
        options, rows = self.config.validation, [self.rows[i] for i in mine]
        device = self.accelerator.device
        images = sample_images(
            self.model,
            [row["prompt"] for row in rows],
            moved(prompt_ids(RESERVED_ITERATION, torch.tensor(mine)), device),
            seed=self.config.seed,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            max_batch=self.config.train.max_batch,
            size=(self.config.model.height, self.config.model.width),
            poll=self.stop.poll,
        )
        with self.stop.in_reward():
            scores = {n: v.tolist() for n, v in evaluate(self.rewards, images, rows).items()}
        weights = self.config.reward.weights
        mean = [sum(w * scores[n][i] for n, w in weights.items()) for i in range(len(rows))]
        return images.cpu(), {"mean": mean, **scores}

    def _write(self, step: int, parts: Sequence[Part], means: dict[str, float]) -> None:
        directory = Path(self.config.output_dir)
        shown = parts[: self.config.validation.num_images]
        tracking.save_grid(
            directory / "samples" / f"step-{step}.png",
            torch.stack([image for _, image, _ in shown]),
            [self.rows[i]["prompt"] for i, _, _ in shown],
            [scores["mean"] for _, _, scores in shown],
            f"held-out prompts after {step} optimizer steps, "
            f"mean reward {means['reward/mean']:.2f} over {len(parts)}",
        )
        # Last: the line says that the validation is done.
        durable.append_line(directory / "validation.jsonl", {"step": step, **means})


def evaluate(
    rewards: Mapping[str, Reward], images: Tensor, rows: Sequence[dict[str, Any]]
) -> dict[str, Tensor]:
    """Every reward of every image: name -> (B,) float32, on the device of the images.

    Raises ValueError for a reward that does not return one number per image.
    """
    prompts, scores = [row["prompt"] for row in rows], {}
    for name, reward in rewards.items():
        with torch.no_grad():
            value = torch.as_tensor(reward(images, prompts, rows), dtype=torch.float32)
        if value.shape != (len(images),):
            shape = tuple(value.shape)
            raise ValueError(f"reward {name!r}: returned shape {shape}, expected ({len(images)},)")
        scores[name] = value.to(images.device)
    return scores


@torch.no_grad()
def sample_images(
    model: Any,
    prompts: Sequence[str],
    sample_id: Tensor,
    *,
    seed: int,
    num_inference_steps: int,
    kind: str = "ode",
    noise_level: float = 0.0,
    guidance_scale: float = 1.0,
    max_batch: int = 16,
    size: tuple[int | None, int | None] = (None, None),
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """One image per prompt, (B, 3, H, W) in [0, 1]; sample_id (B,) picks the noise.

    kind, noise_level: of the sampler, as in `schedules`; by default the deterministic one.
    poll: called before every network call; may raise.
    """
    conditioning = model.encode([*prompts, ""])
    plan = Plan()
    node = plan.root(0)
    for sigma in model.sigmas(num_inference_steps).tolist()[1:]:
        is_ode = kind == "ode" or noise_level == 0
        node = plan.step(node, sigma) if is_ode else plan.draw(node, sigma, kind, noise_level, 0)
    plan.leaf(node)

    def velocity(x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        poll()
        return model.velocity(x_t, sigma, conditioning[prompt])

    rollout = run(
        plan,
        velocity,
        Source(seed, sample_id, model.latent_shape(*size)),
        max_batch,
        guidance=None if guidance_scale == 1 else Guidance(guidance_scale, len(prompts)),
    )
    return model.decode(rollout.latents.flatten(0, 1))
