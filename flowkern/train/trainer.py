"""The trainer. `Trainer.step` is the loop of every algorithm; the rest of the class carries it.

P prompts of a rollout, of this rank unless stated, each with L leaves and C trained choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkern.rollout import Plan, Rollout, Source, batch, network_rows, prompt_ids, run
from flowkern.rollout.engine import Velocity, moved, slices
from flowkern.train import distributed, lora, metrics, tracking
from flowkern.train.config import Config, ConfigError
from flowkern.train.copies import Copies
from flowkern.train.distributed import Laps
from flowkern.train.loading import load_pipeline
from flowkern.train.metrics import Progress
from flowkern.train.optimizer import make_optimizer, make_schedule, restore
from flowkern.train.prompts import draw_prompts, read_prompts
from flowkern.train.run import Run
from flowkern.train.scoring import Scores, load_rewards, score
from flowkern.train.stop import StopRequest
from flowkern.train.validation import Validation

EVALUATED = "evaluated"  # the copy of the weights that ema_decay makes
SAMPLED = "sampled"  # that of those which drew the rollout, while optimizer steps follow it
Row = dict[str, Any]
"""A prompt with its metadata."""


class Trainer:
    """Everything a run holds. `run` does all of it; `step` is one iteration."""

    def __init__(self, config: Config, model: Any = None) -> None:
        """model: an adapter that is in memory, on the device, in place of model.path's."""
        self.config, self.recipe = config, config.algorithm
        self.global_step = self.iteration = 0  # optimizer steps and rollouts so far
        self.updates_done = 0  # optimizer steps of the rollout under way
        self.is_whole = True  # no optimizer step is half done
        self.progress: Progress | None = None
        self.output_dir = Path(config.output_dir)
        self.accelerator = distributed.make_accelerator(config)
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.stop = StopRequest(acts_alone=self.accelerator.is_main_process)
        self.prompts = read_prompts(config.data.train_prompts, "data.train_prompts")
        count, updates = self.recipe.prompts_per_rollout, self.recipe.updates_per_rollout
        self.slots = distributed.share(count, self.rank, self.world, updates)  # on the host
        draw_prompts(len(self.prompts), count, config.seed, 0)  # refuses too many, before loading
        self._load(model)

    def _load(self, model: Any) -> None:
        config, options = self.config, self.config.train
        torch.manual_seed(config.seed)
        self.model: Any = load_pipeline(config, self.device) if model is None else model
        self._check_plan()  # refused before anything is written
        if config.model.gradient_checkpointing:
            self.model.network.enable_gradient_checkpointing()
        self.network = lora.add_lora(self.model, config.lora)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.parameters, options)
        self.lr_scheduler = make_schedule(optimizer, options)
        self.copies = Copies(self.parameters, self._names_of_copies())
        # `trained` is `network` as gradients need it: wrapped for several processes.
        self.trained, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.rewards = load_rewards(config.reward)
        self.objective = self.recipe.objective(uncond=len(self.slots))
        self.validation = Validation(config, self.accelerator, self.model, self.rewards, self.stop)

    def _check_plan(self) -> None:
        """On the grid of the model, which the configuration does not know."""
        try:
            self.recipe.plan(self.model.sigmas)
        except ValueError as error:
            is_option = str(error).partition(":")[0] in {f.name for f in fields(self.recipe)}
            raise ConfigError(f"algorithm{'.' if is_option else ': '}{error}") from error

    def _names_of_copies(self) -> list[str]:
        names = list(self.recipe.copies)
        if self.evaluated is not None:
            names.append(EVALUATED)
        if self.recipe.updates_per_rollout > 1 and self.recipe.sampler is None:
            names.append(SAMPLED)
        return names

    # ---- one iteration ----

    def step(self) -> list[dict[str, float]]:
        """A rollout and its optimizer steps, or those that are left of them after a resume, which
        draws the rollout again; returns the metrics of each.
        """
        laps = Laps(self.device, lambda: self.model.rows)
        decays = {name: decay(self.iteration + 1) for name, decay in self.recipe.copies.items()}
        released = self.released_rows()
        distributed.seed_generators(self.config.seed, self.iteration, self.rank)
        if SAMPLED in self.copies and self.updates_done == 0:
            self.copies.update(SAMPLED, 0.0)
        prompts = self.draw_prompts()
        rollout = self.sample(prompts)
        laps.mark()
        found, leaves = self.score(rollout, prompts), len(rollout.plan.leaves)
        scores = {name: value.view(-1, leaves) for name, value in found.rewards.items()}
        advantage = self.credit(scores, rollout.plan)
        laps.mark()
        weights = self.config.reward.weights
        flat = self.recipe.credit().zero_std_ratio(scores, weights, rollout.plan)
        told = found.means() | {"zero_std_ratio": flat}
        self.progress = Progress(told, len(found), laps, released, self.updates_done == 0)
        for share in self.split()[self.updates_done :]:
            self.stop.poll()
            self.progress.updates.append(self.learn_from(rollout, share, advantage))
            laps.mark()
        with self.changing():
            self.iteration, self.updates_done = self.iteration + 1, 0
            for name, decay in decays.items():
                self.copies.update(name, decay)
        return self.report()

    def learn_from(self, rollout: Rollout, share: Tensor, advantage: Tensor) -> dict[str, float]:
        """One optimizer step, on the prompts `share` of every rank; returns what it reports."""
        totals = torch.zeros(len(metrics.STATISTICS), device=self.device)
        calls = self.network_calls(rollout.plan, advantage, share)
        choices = len(share) * advantage.shape[2]
        for i, (site, prompt) in enumerate(calls):
            rows = batch(rollout, site, share[prompt], advantage[self.rank])
            with self.accelerator.no_sync(self.trained) if calls[i + 1 :] else nullcontext():
                out = self.objective(rows, self.learn, self.anchors())
                self.accelerator.backward(out.loss / choices)
            totals += metrics.summed(out)
        teaches = self.objective.needs_all or bool(advantage[:, share].any())
        return self.update(totals / choices, teaches)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what must happen as a whole: a state in between is never saved."""
        self.is_whole = False
        yield
        self.is_whole = True

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
            self.velocity_of(recipe.sampler or (SAMPLED if SAMPLED in self.copies else None)),
            Source(seed, ids, model.latent_shape(*size)),
            self.config.train.max_batch,
            guidance=recipe.guidance(uncond=len(prompts)),
            # Where the weights move in between, or never were those that sampled.
            keep_velocity=recipe.updates_per_rollout > 1 or recipe.sampler is not None,
        )

    def score(self, rollout: Rollout, prompts: Sequence[Row]) -> Scores:
        """Of the images of all ranks, prompt by prompt."""
        latents = rollout.latents.flatten(0, 1)
        rows = [row for row in prompts for _ in rollout.plan.leaves]
        parts = slices(len(latents), self.config.train.max_batch)
        batches = ((self.model.decode(latents[part]), rows[part]) for part in parts)
        found = distributed.together(
            self.accelerator, lambda: score(self.rewards, batches, self.stop.in_reward)
        )
        return Scores.joined(found)

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

    def update(self, means: Tensor, teaches: bool = True) -> dict[str, float]:
        """The optimizer step; the only place in a step where the host waits for its results.

        teaches: False where every advantage is zero and nothing else pulls; the step then counts,
        and neither weight decay nor the optimizer's moments see it.
        """
        options, norm = self.config.train, means.new_zeros(1)
        if teaches:
            norm = self.accelerator.clip_grad_norm_(self.parameters, options.max_grad_norm)
        sums = [means, self.stop.flags(self.device)] if self.world > 1 else [means]
        sums = self.accelerator.reduce(torch.cat(sums), "mean")
        grad_norm, *values = torch.cat([norm.reshape(1).to(means), sums]).tolist()
        values, flags = values[: len(means)], values[len(means) :]
        if flags:
            self.stop.hear(flags)
        found = dict(zip(metrics.STATISTICS, values, strict=True))
        loss, trained, step = found.pop("loss"), found.pop("trained"), self.global_step + 1
        for name in ("ratio_mean", "pg_clipfrac_higher", "pg_clipfrac_lower"):
            found[name] /= trained  # there is none of those left out
        is_scaled = self.accelerator.scaler is not None  # fp16 skips a step that overflowed
        for name, value in {"loss": loss, "gradient norm": 0.0 if is_scaled else grad_norm}.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {step}: the {name} is {value}; stopped before the weights moved; a "
                    "lower train.learning_rate may help"
                )
        with self.changing():
            if teaches:
                self.optimizer.step()
                self.copies.weights_moved()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
            self.global_step, self.updates_done = step, self.updates_done + 1
            if options.ema_decay is not None:
                self.copies.update(EVALUATED, min((1 + step) / (10 + step), options.ema_decay))
        return {"step": step, **found, "grad_norm": grad_norm}

    def report(self) -> list[dict[str, float]]:
        """The metrics of the optimizer steps that were not reported yet."""
        progress, self.progress = self.progress, None
        if progress is None or not progress.updates:
            return []
        updates = self.recipe.updates_per_rollout
        found = metrics.records(progress, updates, self.world)
        return [r | {"memory/peak_gb": tracking.peak_memory_gb(self.device)} for r in found]

    def released_rows(self) -> tuple[int, int]:
        """Rows forward of the authors' loop, of all ranks: in sampling, in training."""
        recipe, prompts = self.recipe, self.recipe.prompts_per_rollout
        cost = recipe.released(self.iteration, self.config.seed)
        halves = 1 if recipe.guidance(uncond=0) is None else 2
        forwards = self.objective.forwards
        return round(prompts * halves * cost.sample), round(prompts * forwards * cost.train)

    # ---- the velocity, as the step needs it ----

    def velocity(self, x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        self.stop.poll()
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

    # ---- what a checkpoint holds ----

    @property
    def evaluated(self) -> str | None:
        """The copy of the weights that is validated; None: the weights themselves."""
        return None if self.config.train.ema_decay is None else EVALUATED

    def save(self, directory: Path) -> None:
        """The adapter, the mean that is validated, and state.pt. Nothing here needs other ranks."""
        lora.save_lora(self.network, self.model.pipeline, directory)
        if self.evaluated is not None:
            with self.copies.using(self.evaluated):
                lora.save_lora(self.network, self.model.pipeline, directory / "ema")
        scaler = self.accelerator.scaler
        state = {
            "step": self.global_step,
            "iteration": self.iteration,
            "updates_done": self.updates_done,
            "optimizer": self.optimizer.state_dict(),
            "copies": self.copies.state_dict(),
        } | ({"scaler": scaler.state_dict()} if scaler else {})
        with (directory / "state.pt").open("wb") as file:
            torch.save(state, file)

    def load(self, directory: Path) -> None:
        """The same on every rank, however many there are and were."""
        state = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
        self.copies.load_state_dict(state["copies"])
        lora.restore_lora(self.network, directory)
        self.global_step, self.iteration = state["step"], state["iteration"]
        self.updates_done = state["updates_done"]
        restore(self.optimizer, self.lr_scheduler, state["optimizer"], self.global_step)
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def run(self) -> int:
        """Train until train.steps; see `Run.go`."""
        return Run(self).go()
