"""The trainer. `Trainer.step` is the loop of every algorithm; the rest of the class carries it.

P prompts of a rollout, of this rank unless stated, each with L leaves and C trained choices.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.optimization import get_scheduler
from torch import Tensor

from flowkern.rewards import load_reward
from flowkern.rl.advantage import zero_std_ratio
from flowkern.rollout import Plan, Rollout, Source, batch, network_rows, prompt_ids, run
from flowkern.rollout.engine import Velocity, moved, slices
from flowkern.train import checkpoint, distributed, lora, metrics, tracking
from flowkern.train.config import Config, to_dict
from flowkern.train.copies import Copies
from flowkern.train.distributed import Laps, StopRequest
from flowkern.train.loading import load_pipeline
from flowkern.train.prompts import draw_prompts, read_prompts
from flowkern.train.validation import Validation, evaluate

EVALUATED = "evaluated"  # the copy of the weights that ema_decay makes
Row = dict[str, Any]
"""A prompt with its metadata."""


class Trainer:
    """Everything a run holds. `run` does all of it; `step` is one iteration."""

    def __init__(self, config: Config, model: Any = None) -> None:
        """model: an adapter that is in memory, on the device, in place of model.path's."""
        self.config, self.recipe = config, config.algorithm
        self.global_step = self.iteration = 0  # optimizer steps and rollouts so far
        self.output_dir = Path(config.output_dir)
        self.accelerator = distributed.make_accelerator(config)
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.prompts = read_prompts(config.data.train_prompts)
        count, updates = self.recipe.prompts_per_rollout, self.recipe.updates_per_rollout
        self.slots = distributed.share(count, self.rank, self.world, updates)  # on the host
        draw_prompts(len(self.prompts), count, config.seed, 0)  # refuses too many, before loading
        self._load(model)

    def _load(self, model: Any) -> None:
        config, options = self.config, self.config.train
        torch.manual_seed(config.seed)
        self.model: Any = load_pipeline(config, self.device) if model is None else model
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
        means = () if options.ema_decay is None else (EVALUATED,)
        self.copies = Copies(self.parameters, (*self.recipe.copies, *means))
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
        rollout = self.sample(prompts)
        laps.mark()
        scores = self.score(rollout, prompts)
        advantage = self.credit(scores, rollout.plan)
        laps.mark()
        for share in self.split():
            totals = torch.zeros(len(metrics.STATISTICS), device=self.device)
            calls = self.network_calls(rollout.plan, advantage, share)
            choices = len(share) * advantage.shape[2]
            for i, (site, prompt) in enumerate(calls):
                rows = batch(rollout, site, share[prompt], advantage[self.rank])
                with self.accelerator.no_sync(self.trained) if calls[i + 1 :] else nullcontext():
                    out = self.objective(rows, self.learn, self.anchors())
                    self.accelerator.backward(out.loss / choices)
                totals += metrics.summed(out)
            updates.append(self.update(totals / choices))
            laps.mark()
        self.iteration += 1
        self.update_copies()
        return self.report(rollout.plan, scores, updates, laps)

    def draw_prompts(self) -> list[Row]:
        """This rank's prompts of the iteration, P."""
        count = self.recipe.prompts_per_rollout
        drawn = draw_prompts(len(self.prompts), count, self.config.seed, self.iteration)
        return [self.prompts[drawn[slot]] for slot in self.slots.tolist()]

    def sample(self, prompts: Sequence[Row]) -> Rollout:
        """The tree of every prompt, under the weights that sample."""
        recipe, model, seed = self.recipe, self.model, self.config.seed
        self.conditioning = model.encode([row["prompt"] for row in prompts] + [""])
        size = self.config.model.height, self.config.model.width
        ids = moved(prompt_ids(self.iteration, self.slots), self.device)
        return run(
            recipe.plan(model.sigmas, self.iteration, seed),
            self.velocity_of(recipe.sampler),
            Source(seed, ids, model.latent_shape(*size)),
            self.config.train.max_batch,
            guidance=recipe.guidance(uncond=len(prompts)),
            # Where the weights move in between, or never were those that sampled.
            keep_velocity=recipe.updates_per_rollout > 1 or recipe.sampler is not None,
        )

    def score(self, rollout: Rollout, prompts: Sequence[Row]) -> dict[str, Tensor]:
        """Every reward, and their weighted sum "mean", (all ranks' prompts, L), on the host."""
        latents = rollout.latents.flatten(0, 1)
        leaves = len(rollout.plan.leaves)
        rows, parts = [row for row in prompts for _ in range(leaves)], []
        for part in slices(len(latents), self.config.train.max_batch):
            found = evaluate(self.rewards, self.model.decode(latents[part]), rows[part])
            parts.append(torch.stack([*found.values()], dim=1))
        table = distributed.gather(self.accelerator, torch.cat(parts))
        scores = {
            name: value.view(-1, leaves)
            for name, value in zip(self.rewards, table.unbind(1), strict=True)
        }
        for name, value in scores.items():
            bad = value[~torch.isfinite(value)].tolist()
            if bad:
                raise FloatingPointError(
                    f"step {self.global_step + 1}: reward {name} is {bad[0]} for {len(bad)} of "
                    f"{value.numel()} images; the last checkpoint stands"
                )
        weights = self.config.reward.weights
        return {"mean": sum(weight * scores[name] for name, weight in weights.items()), **scores}

    def credit(self, scores: dict[str, Tensor], plan: Plan) -> Tensor:
        """The advantages of all ranks, (ranks, P, C); the same for any number of ranks."""
        advantage = self.recipe.credit()(scores, self.config.reward.weights, plan)
        return advantage.view(self.world, len(self.slots), -1)

    def split(self) -> tuple[Tensor, ...]:
        """The prompts of each optimizer step: never siblings apart."""
        return torch.arange(len(self.slots)).tensor_split(self.recipe.updates_per_rollout)

    def network_calls(
        self, plan: Plan, advantage: Tensor, share: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Which sites of which of the prompts `share` each call of an optimizer step is for."""
        limit, needs_all = self.config.train.max_batch, self.objective.needs_all
        return network_rows(plan, advantage[:, share], self.rank, limit, needs_all)

    def update(self, means: Tensor) -> dict[str, float]:
        """The optimizer step; the only place in a step where the host waits for its results."""
        options = self.config.train
        norm = self.accelerator.clip_grad_norm_(self.parameters, options.max_grad_norm)
        means = self.accelerator.reduce(means, "mean")
        *values, grad_norm = torch.cat([means, norm.reshape(1).to(means)]).tolist()
        found = dict(zip(metrics.STATISTICS, values, strict=True))
        loss, trained, step = found.pop("loss"), found.pop("trained"), self.global_step + 1
        for name in ("ratio_mean", "pg_clipfrac_higher", "pg_clipfrac_lower"):
            found[name] /= trained  # there is none of those left out
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
        self.copies.weights_moved()
        if options.ema_decay is not None:
            self.copies.update(EVALUATED, min((1 + step) / (10 + step), options.ema_decay))
        return {"step": step, **found, "grad_norm": grad_norm}

    def update_copies(self) -> None:
        """Once per rollout, after its optimizer steps."""
        for name, decay in self.recipe.copies.items():
            self.copies.update(name, decay(self.iteration))

    def report(
        self, plan: Plan, scores: dict[str, Tensor], updates: list[dict[str, float]], laps: Laps
    ) -> list[dict[str, float]]:
        """The metrics of an iteration's optimizer steps."""
        found = metrics.records(scores, updates, laps, self.released_rows(), self.world)
        found[0]["zero_std_ratio"] = zero_std_ratio(scores["mean"], plan).item()
        return [r | {"memory/peak_gb": tracking.peak_memory_gb(self.device)} for r in found]

    def released_rows(self) -> tuple[int, int]:
        """Rows forward of the authors' loop, of all ranks: in sampling, in training."""
        recipe, prompts = self.recipe, self.recipe.prompts_per_rollout
        cost = recipe.released(self.iteration - 1, self.config.seed)
        halves = 1 if recipe.guidance_scale == 1 else 2
        forwards = self.objective.forwards
        return round(prompts * halves * cost.sample), round(prompts * forwards * cost.train)

    # ---- the velocity, as the step needs it ----

    def velocity(self, x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return self.model.velocity(x_t, sigma, self.conditioning[prompt])

    def learn(self, x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Under the current weights, for gradients: through the wrapper that joins them."""
        self.model.network = self.trained
        return self.velocity(x_t, sigma, prompt)

    def velocity_of(self, name: str | None) -> Velocity:
        """Without gradient: of a copy of the weights, of the current ones (None), or of
        "reference", the weights without the adapter, from which training started.
        """

        def velocity(x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
            self.model.network = self.network
            is_reference = name == "reference"
            weights = self.network.disable_adapter() if is_reference else self.copies.using(name)
            with torch.no_grad(), weights:
                return self.velocity(x_t, sigma, prompt)

        return velocity

    def anchors(self) -> dict[str, Velocity]:
        """What the objective compares with; no copy that is known to equal the weights."""
        copies = self.copies
        names = [n for n in self.objective.anchors if not copies.is_current(n)]
        return {name: self.velocity_of(name) for name in names}

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
            if self.evaluated is not None:
                with self.copies.using(self.evaluated):
                    lora.save_lora(self.network, self.model.pipeline, partial / "ema")
            text = yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True)
            (partial / "config.yaml").write_text(text)
            scaler = self.accelerator.scaler
            parts = {
                "optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler,
                "copies": self.copies,
            }  # fmt: skip
            state = {"step": self.global_step, "iteration": self.iteration} | {
                n: p.state_dict() for n, p in parts.items()
            }
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
        self.copies.load_state_dict(state["copies"])
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if (path := directory / f"random-{self.rank}.pt").is_file():  # none for ranks that are new
            checkpoint.load_random_state(path)
        self.global_step, self.iteration = state["step"], state["iteration"]
        if self.accelerator.is_main_process:
            for name in ("metrics.jsonl", "validation.jsonl"):
                checkpoint.truncate_lines(self.output_dir / name, self.global_step)
            checkpoint.discard_later(self.output_dir, self.global_step)
        self.say(f"resumed from {directory}")

    def validate(self) -> None:
        self.model.network = self.network
        with self.copies.using(self.evaluated):
            self.validation.run(self.global_step)
        self.draw_curves()

    @property
    def evaluated(self) -> str | None:
        """The copy of the weights that is validated; None: the weights themselves."""
        return None if self.config.train.ema_decay is None else EVALUATED

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
