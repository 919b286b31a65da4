"""The trainer. `Trainer.step` is the loop of every algorithm; the rest of the class carries it.

P prompts of a rollout, G samples of each, B = P * G, E trained edges: of this rank unless stated.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.optimization import get_scheduler
from torch import Tensor

from flowkern.ops.policy_loss import PolicyLoss
from flowkern.rewards import load_reward
from flowkern.rl.advantage import zero_std_ratio
from flowkern.rollout.engine import Rollout, Roots, run, sample_ids
from flowkern.train import checkpoint, distributed, lora, tracking
from flowkern.train.config import Config, to_dict
from flowkern.train.distributed import Laps, StopRequest
from flowkern.train.loading import load_pipeline
from flowkern.train.prompts import draw_prompts, read_prompts
from flowkern.train.validation import Validation, evaluate

STATISTICS = ("loss", "ratio_mean", "pg_clipfrac_higher", "pg_clipfrac_lower", "kl")
Row = dict[str, Any]
"""A prompt with its metadata."""


class Trainer:
    """Everything a run holds. `run` does all of it; `step` is one iteration."""

    def __init__(self, config: Config) -> None:
        self.config, self.recipe, self.global_step = config, config.algorithm, 0
        self.output_dir = Path(config.output_dir)
        self.accelerator = distributed.make_accelerator(config)
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.prompts = read_prompts(config.data.train_prompts)
        count, updates = self.recipe.prompts_per_rollout, self.recipe.updates_per_rollout
        self.slots = distributed.share(count, self.rank, self.world, updates).to(self.device)
        draw_prompts(len(self.prompts), count, config.seed, 0)  # refuses too many, before loading
        self._load()

    def _load(self) -> None:
        config, options = self.config, self.config.train
        torch.manual_seed(config.seed)
        self.model: Any = load_pipeline(config, self.device)
        self.recipe.plan(self.model.sigmas)  # refused before anything is written
        if config.model.gradient_checkpointing:
            self.model.network.enable_gradient_checkpointing()
        self.network = lora.add_lora(self.model, config.lora)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
        )
        self.lr_scheduler = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.steps,
        )
        # `trained` is `network` as gradients need it: wrapped for several processes.
        self.trained, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        names = [*config.reward.weights, *config.reward.report]
        self.rewards = {name: load_reward(name) for name in names}
        self.objective = self.recipe.objective(uncond=len(self.slots))
        self.validation = Validation(config, self.accelerator, self.model, self.rewards)

    # ---- one iteration ----

    def step(self) -> list[dict[str, float]]:
        """A rollout and its optimizer steps; returns the metrics of each."""
        laps, updates = Laps(self.device, lambda: self.model.rows), []
        prompts = self.draw_prompts()
        rollout, images = self.sample(prompts)
        laps.mark()
        scores = self.score(images, prompts)
        advantage = self.credit(scores)
        laps.mark()
        for samples in self.split():
            totals, count = torch.zeros(len(STATISTICS), device=self.device), 0
            rows = len(rollout.chain.trained) * len(samples)
            for edge, sample in self.micro_batches(samples, rows):
                count += len(sample)
                batch = rollout.batch(edge, sample)
                with self.accelerator.no_sync(self.trained) if count < rows else nullcontext():
                    out = self.objective(self.learn, batch, advantage[sample], self.reference)
                    self.accelerator.backward(out.loss / rows)
                totals += summed(out)
            updates.append(self.update(totals / rows))
            laps.mark()
        return self.report(scores, updates, laps)

    def draw_prompts(self) -> list[Row]:
        """This rank's prompts of the iteration, P."""
        iteration = self.global_step // self.recipe.updates_per_rollout
        count = self.recipe.prompts_per_rollout
        drawn = draw_prompts(len(self.prompts), count, self.config.seed, iteration)
        return [self.prompts[drawn[slot]] for slot in self.slots.tolist()]

    def sample(self, prompts: Sequence[Row]) -> tuple[Rollout, Tensor]:
        """A rollout under the current weights, G samples per prompt, and its images."""
        recipe, model = self.recipe, self.model
        self.conditioning = model.encode([row["prompt"] for row in prompts] + [""])
        iteration = self.global_step // recipe.updates_per_rollout
        local = torch.arange(len(prompts), device=self.device)
        roots = Roots(
            seed=self.config.seed,
            sample_id=sample_ids(iteration, self.slots, recipe.group_size),
            prompt=local.repeat_interleave(recipe.group_size),
            shape=model.latent_shape(self.config.model.height, self.config.model.width),
        )
        rollout = run(
            recipe.plan(model.sigmas),
            self.act,
            roots,
            self.config.train.max_batch,
            guidance_scale=recipe.guidance_scale,
            uncond=len(prompts),
            keep_velocity=recipe.updates_per_rollout > 1,  # the weights move in between
        )
        return rollout, model.decode(rollout.latents)

    def score(self, images: Tensor, prompts: Sequence[Row]) -> dict[str, Tensor]:
        """Every reward, and their weighted sum "mean", of the samples of all ranks, on the host."""
        rows = [row for row in prompts for _ in range(self.recipe.group_size)]
        local = evaluate(self.rewards, images, rows)
        table = distributed.gather(self.accelerator, torch.stack([*local.values()], dim=1))
        scores = dict(zip(local, table.unbind(1), strict=True))
        for name, value in scores.items():
            bad = value[~torch.isfinite(value)].tolist()
            if bad:
                raise FloatingPointError(
                    f"step {self.global_step + 1}: reward {name} is {bad[0]} for {len(bad)} of "
                    f"{len(value)} images; the last checkpoint stands"
                )
        weights = self.config.reward.weights
        return {"mean": sum(weight * scores[name] for name, weight in weights.items()), **scores}

    def credit(self, scores: dict[str, Tensor]) -> Tensor:
        """The advantages of this rank's samples, (B,); the same for any number of ranks."""
        advantage = self.recipe.credit(scores["mean"], self.group())
        count = len(self.slots) * self.recipe.group_size
        return advantage[self.rank * count :][:count].to(self.device)

    def group(self) -> Tensor:
        """The group of every sample of all ranks: its prompt's slot."""
        slots = torch.arange(self.recipe.prompts_per_rollout)
        return slots.repeat_interleave(self.recipe.group_size)

    def split(self) -> tuple[Tensor, ...]:
        """The samples of each optimizer step: whole groups."""
        samples = torch.arange(len(self.slots) * self.recipe.group_size, device=self.device)
        return samples.tensor_split(self.recipe.updates_per_rollout)

    def micro_batches(self, samples: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All pairs of a trained edge and a sample, as few batches as max_batch allows."""
        pair = torch.arange(rows, device=self.device)
        edge, sample = pair // len(samples), samples[pair % len(samples)]
        parts = math.ceil(rows / self.config.train.max_batch)
        return zip(edge.tensor_split(parts), sample.tensor_split(parts), strict=True)

    def update(self, means: Tensor) -> dict[str, float]:
        """The optimizer step; the only place in a step where the host waits for its results."""
        options = self.config.train
        norm = self.accelerator.clip_grad_norm_(self.parameters, options.max_grad_norm)
        means = self.accelerator.reduce(means, "mean")
        *values, grad_norm = torch.cat([means, norm.reshape(1).to(means)]).tolist()
        metrics = dict(zip(STATISTICS, values, strict=True))
        loss, step = metrics.pop("loss"), self.global_step + 1
        is_scaled = self.accelerator.scaler is not None  # fp16 skips a step that overflowed
        for name, value in {"loss": loss, "gradient norm": 0.0 if is_scaled else grad_norm}.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {step}: the {name} is {value}; stopped before the weights moved, the "
                    "last checkpoint stands; a lower train.learning_rate may help"
                )
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.global_step = step
        return {"step": step, **metrics, "grad_norm": grad_norm}

    def report(
        self, scores: dict[str, Tensor], updates: list[dict[str, float]], laps: Laps
    ) -> list[dict[str, float]]:
        """The metrics of an iteration's steps; those of the rollout are in the first."""
        (rollout, reward, *train), (sampled, _, *trained) = laps.seconds(), laps.counts()
        images, naive = len(scores["mean"]), self.recipe.released_rows()
        first = {f"reward/{name}": value.double().mean().item() for name, value in scores.items()}
        first |= {
            "zero_std_ratio": zero_std_ratio(scores["mean"], self.group()).item(),
            "nfe/sample": sampled * self.world,
            "nfe/naive_sample": images * naive[0],
            "timing_s/rollout": rollout,
            "timing_s/reward": reward,
            "throughput/images_per_s": images / (rollout + reward + sum(train)),
        }
        records = []
        for i, (metrics, seconds, rows) in enumerate(zip(updates, train, trained, strict=True)):
            records.append(metrics | (first if i == 0 else {}))
            records[-1] |= {
                "nfe/train": rows * self.world,
                "nfe/naive_train": images * naive[1] // len(updates),
                "timing_s/train": seconds,
                "timing_s/step": seconds + (rollout + reward if i == 0 else 0),
                "memory/peak_gb": tracking.peak_memory_gb(self.device),
            }
        return records

    # ---- the velocity, as the step needs it ----

    def act(self, x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Under the current weights, for sampling."""
        self.model.network = self.network
        return self.model.velocity(x_t, sigma, self.conditioning[prompt])

    def learn(self, x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Under the current weights, for gradients: through the wrapper that joins them."""
        self.model.network = self.trained
        return self.model.velocity(x_t, sigma, self.conditioning[prompt])

    def reference(self, x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Without the adapter: the weights that training started from."""
        with self.network.disable_adapter():
            return self.act(x_t, sigma, prompt)

    # ---- the run ----

    def run(self) -> int:
        """Train until train.steps. Returns the exit status: 0, or 128 + a signal."""
        total, status = self.config.train.steps, 0
        self.begin()
        bar = tracking.progress_bar(total, self.global_step, self.accelerator.is_main_process)
        with StopRequest() as stop, bar:
            if self.global_step == 0:
                self.validate()
            while self.global_step < total and not status:
                before = self.global_step
                records = self.step()
                self.log(records)
                bar.update(len(records))
                bar.set_postfix(reward=f"{records[0]['reward/mean']:.3f}")
                status = distributed.agree(self.accelerator, stop.status)
                if self.is_due(self.config.validation.steps, before) and not status:
                    self.validate()
                if self.is_due(self.config.train.checkpointing_steps, before) or status:
                    self.save()
        self.say(
            f"stopped after step {self.global_step}; continue with "
            "train.resume_from_checkpoint=latest"
            if status
            else f"done: {self.global_step} steps in {self.output_dir}"
        )
        distributed.finish(self.accelerator)
        return status

    def is_due(self, every: int, before: int) -> bool:
        """Has the iteration that began at `before` passed a multiple of `every`, or the end?"""
        at_end = self.global_step >= self.config.train.steps
        return at_end or self.global_step // every > before // every

    def begin(self) -> None:
        """The run directory, new or resumed."""
        options, tree = self.config.train, to_dict(self.config)
        found = None
        if options.resume_from_checkpoint:
            found = checkpoint.find_checkpoint(options.resume_from_checkpoint, self.output_dir)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            overwrite = options.overwrite_output_dir
            checkpoint.prepare_output_dir(self.output_dir, found, overwrite)
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
            (self.output_dir / "config.yaml").write_text(text)
        self.accelerator.wait_for_everyone()
        if found is not None:
            self.resume(found)
        if options.report_to:
            self.accelerator.init_trackers("flowkern", config=tracking.flat(tree))

    def save(self) -> None:
        """checkpoint-N, whole or not at all."""
        main = self.accelerator.is_main_process
        partial = checkpoint.partial_path(self.output_dir, self.global_step)
        if main:
            checkpoint.begin(partial)
        self.accelerator.wait_for_everyone()
        checkpoint.save_random_state(partial / f"random-{self.rank}.pt")
        if main:
            lora.save_lora(self.network, self.model.pipeline, partial)
            text = yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True)
            (partial / "config.yaml").write_text(text)
            scaler = self.accelerator.scaler
            parts = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler}
            state = {"step": self.global_step} | {n: p.state_dict() for n, p in parts.items()}
            torch.save(
                state | ({"scaler": scaler.state_dict()} if scaler else {}), partial / "state.pt"
            )
        self.accelerator.wait_for_everyone()
        if main:
            checkpoint.commit(partial, self.config.train.checkpoints_total_limit)
        self.draw_curves()
        self.accelerator.wait_for_everyone()

    def resume(self, directory: Path) -> None:
        """Continue as if never stopped: metrics and checkpoints of later steps are dropped."""
        lora.restore_lora(self.network, directory)
        state = torch.load(directory / "state.pt", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if (path := directory / f"random-{self.rank}.pt").is_file():  # none for ranks that are new
            checkpoint.load_random_state(path)
        self.global_step = state["step"]
        if self.accelerator.is_main_process:
            for name in ("metrics.jsonl", "validation.jsonl"):
                checkpoint.truncate_lines(self.output_dir / name, self.global_step)
            checkpoint.discard_later(self.output_dir, self.global_step)
        self.say(f"resumed from {directory}")

    def validate(self) -> None:
        self.model.network = self.network
        self.validation.run(self.global_step)
        self.draw_curves()

    def draw_curves(self) -> None:
        """reward_curve.png of what is on disk."""
        if self.accelerator.is_main_process:
            lines = [self.output_dir / name for name in ("metrics.jsonl", "validation.jsonl")]
            tracking.save_curves(
                self.output_dir / "reward_curve.png",
                *map(tracking.read_lines, lines),
                optimized=self.config.reward.weights,
            )

    def log(self, records: Sequence[dict[str, float]]) -> None:
        for record in records:
            if self.accelerator.is_main_process:
                tracking.append_line(self.output_dir / "metrics.jsonl", record)
            self.accelerator.log(record, step=record["step"])

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr, flush=True)


def summed(out: PolicyLoss) -> Tensor:
    """STATISTICS over the rows of a micro-batch, on the device."""
    parts = (out.loss, out.ratio, out.clipped_high, out.clipped_low, out.kl)
    return torch.stack([part.detach().float().sum() for part in parts])
