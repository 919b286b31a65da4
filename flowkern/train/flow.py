"""The task of flow-matching models: trees of images per prompt, rewards, and an objective.

P prompts of a rollout, of this rank unless stated, each with L leaves and C trained choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowkern.models import Conditioning, Model, guide_of
from flowkern.rl.cost import network_calls, released_calls
from flowkern.rl.objectives import Outcome, Parts, by_level
from flowkern.rl.plans import cost_of, plans_of
from flowkern.rollout import (
    Blocks,
    Deal,
    Layout,
    Plan,
    Rollout,
    Source,
    StepBatch,
    network_batches,
    prompt_ids,
    run,
    sampled_velocity,
    takes_part,
)
from flowkern.rollout import batch as gathered
from flowkern.rollout.engine import Velocity, slices
from flowkern.rollout.moves import moved
from flowkern.rollout.states import OnHost
from flowkern.train import distributed, metrics
from flowkern.train.attention import require_attention
from flowkern.train.blocks import is_tried, require_quantization, set_blocks, try_blocks
from flowkern.train.config import Config, ConfigError
from flowkern.train.copies import REFERENCE, Weights
from flowkern.train.data import prompts_of
from flowkern.train.distributed import Laps
from flowkern.train.loading import load_pipeline
from flowkern.train.loop import Batch
from flowkern.train.metrics import Experience
from flowkern.train.prompts import Prompt, draw_prompts
from flowkern.train.reward_config import require_asked
from flowkern.train.scoring import MEAN, Scores, load_rewards, score
from flowkern.train.sharding import shard
from flowkern.train.stop import StopRequest
from flowkern.train.trained import load_trained, save_trained, set_trained
from flowkern.train.validation import Validation, held_out, require_guidance

NETWORK = "network"  # the one module that is trained
SAMPLING, REWARD = 0, 1  # laps of `Experience`


@dataclass(frozen=True)
class FlowExperience(Experience):
    rollout: Rollout
    conditioning: Conditioning
    """Of the P prompts, and of none in the last row."""
    advantage: Tensor
    """(ranks, P, C) of all ranks, on the host; NaN: takes no part."""
    kl_weight: Tensor | None = None
    """(P, C) of this rank, as `Credit` has it."""


@dataclass(frozen=True)
class FlowBatch(Batch):
    experience: FlowExperience
    site: Tensor
    """(R,): where the network is called, on the host; so is prompt."""
    prompt: Tensor
    counts: bool
    """False: the network is called because other processes call it, and nothing is learned."""
    is_replayed: bool
    """Is it held against what sampling said?"""


class FlowTask:
    """Answers `loop.Task`."""

    @staticmethod
    def require(config: Config, accelerator: Accelerator) -> None:
        """Raise ConfigError for what shows before a model is looked for."""
        require_attention(config.model)
        require_quantization(config, accelerator.device)
        distributed.require_prompts(
            config, accelerator, len(prompts_of(config.data, "train_prompts"))
        )
        held_out(config)
        require_asked(config.algorithm, config.reward)

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        stop: StopRequest,
        model: Model | None = None,
    ) -> None:
        """model: an adapter that is in memory, on the device, in place of model.path's."""
        self.config, self.recipe = config, config.algorithm
        self.accelerator, self.stop, self.device = accelerator, stop, accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.prompts = prompts_of(config.data, "train_prompts")
        count, updates = self.recipe.prompts_per_rollout, self.recipe.updates_per_rollout
        self.slots = distributed.share(count, self.rank, self.world, updates)  # on the host
        validated = held_out(config)
        torch.manual_seed(config.seed)
        self.rewards = load_rewards(config.reward)  # in seconds; the model may take minutes
        torch.manual_seed(config.seed)  # as if they had drawn nothing
        self.model = load_pipeline(config, self.device) if model is None else model
        self._check_guidance()  # refused before anything is written
        self._check_plan()
        if config.model.gradient_checkpointing:
            self.model.network.enable_gradient_checkpointing()
        self.facts = [set_trained(self.model, config.lora)]
        self.facts += set_blocks(self.model, config, self.device)
        shard(self.model, config, accelerator)
        self.guidance = self.recipe.guidance(len(self.slots), guide_of(self.model))
        self.objective = self.recipe.objective_at(len(self.slots), guide_of(self.model))
        # Where there is no adapter to be left out, or to leave it out would be another graph.
        needs_copy = config.lora is None or config.model.compile
        needs_copy = needs_copy and REFERENCE in self.objective.anchors
        self.copies = [REFERENCE] if needs_copy else []
        self.validation = Validation(config, accelerator, self.model, self.rewards, validated, stop)
        self.is_mine = model is None
        self._fit()

    def _fit(self) -> None:
        """One length of text for all of the run."""
        prompts = [prompt["prompt"] for prompt in (*self.prompts, *self.validation.prompts)]
        try:
            self.model.fit([*prompts, self.model.guidance.negative_prompt])
        except ValueError as error:
            raise ConfigError(f"data: {error}") from None

    def begin(self, iteration: int) -> None:
        """Every prompt that this rank has still to draw is encoded once, and no encoder kept,
        unless the model is another's, who may go on with it. What is compiled, quantized or of
        another attention is tried."""
        if self.is_mine:
            self._encode(iteration)
        if is_tried(self.config.model):
            self.facts += try_blocks(self.model, self.config, self.device)

    def _encode(self, iteration: int) -> None:
        prompts = [self.prompts[place] for place in self._places(iteration)]
        texts = [prompt["prompt"] for prompt in (*prompts, *self.validation.mine)]
        try:
            self.model.prepare(
                [*texts, self.model.guidance.negative_prompt], self.config.model.prompt_cache
            )
        except (OSError, ValueError) as error:
            if str(error).startswith(("path: ", "revision: ", "prompt_cache: ")):
                raise ConfigError(f"model.{error}") from error
            if not isinstance(error, OSError):
                raise ConfigError(f"data: {error}") from error
            # A file that is too large for the disk has no name in its error.
            where = error.filename or self.config.model.prompt_cache
            reason = f"{error.strerror or error}: {str(where)!r:.300}"
            raise ConfigError(f"model.prompt_cache: {reason}") from error

    def _places(self, first: int) -> list[int]:
        """The prompts that this rank will draw from this iteration on, in the order of the file."""
        found: set[int] = set()
        last = self.config.train.steps // self.recipe.updates_per_rollout
        for iteration in range(first, last):
            found.update(self._drawn(iteration))
            if len(found) == len(self.prompts):
                break
        return sorted(found)

    def _check_guidance(self) -> None:
        """Of a model that has one way through the network only, and of a batch that holds less than
        two."""
        objective, validated = self.recipe.objective_at(0), self.config.validation
        ref = getattr(objective, "ref_guidance", None)
        scales = {"algorithm.": self.recipe.guidance_scale, "validation.": validated.guidance_scale}
        for key, scale in (scales | ({"algorithm.ref_": ref.scale} if ref else {})).items():
            require_guidance(self.model, scale, f"{key}guidance_scale")
        least, size = objective.together, self.recipe.group_size
        if (most := self.config.train.max_batch) < least:
            raise ConfigError(
                f"train.max_batch: got {most}, expected at least {least}: both halves of guidance "
                "learn together"
            )
        if objective.compares and most < size:
            raise ConfigError(
                f"train.max_batch: got {most}, expected at least {size}, algorithm.group_size: "
                "what is compared learns in one batch"
            )

    def _check_plan(self) -> None:
        """On the model's grid, which no configuration knows, with the window at each place:
        what cannot be drawn there is said now. In 4096 rollouts the papers' has been everywhere."""
        recipe, steps, seed = self.recipe, self.config.train.steps, self.config.seed
        rollouts = min(4096, -(-steps // recipe.updates_per_rollout))
        first = {recipe.window_start(i, seed): i for i in reversed(range(rollouts))}
        for iteration in first.values():
            plans_of(recipe, self.model.sigmas, iteration, seed)

    def modules(self) -> dict[str, nn.Module]:
        return {NETWORK: self.model.network}

    # ---- collecting ----

    @property
    def calls(self) -> int:
        return self.model.calls

    def planned(self, iteration: int) -> dict[str, float]:
        """Calls of the network on this rank, those that turn out to teach nothing included."""
        plans = self.plans(iteration)
        cost = cost_of([plans[slot] for slot in self.slots.tolist()])
        sampling, training = network_calls(self.recipe, cost, iteration)
        return {"sampling": sampling / self.world, "training": sum(training) / self.world}

    def plans(self, iteration: int) -> Sequence[Plan]:
        """Of all prompts of the iteration, also those of other processes."""
        return plans_of(self.recipe, self.model.sigmas, iteration, self.config.seed)

    def collect(self, iteration: int) -> FlowExperience:
        """A rollout of all the prompts of an iteration, scored."""
        laps = Laps(self.device, lambda: self.model.calls)
        prompts = self.draw_prompts(iteration)
        texts = [*(prompt["prompt"] for prompt in prompts), self.model.guidance.negative_prompt]
        conditioning = self.model.encode(texts).to(self.device)
        blocks = self.sample(iteration, conditioning)
        found = self.score(blocks, prompts, laps)
        plan, weights = blocks.rollout.plan, self.config.reward.weights
        scaled = {name: one.scaled(found.rewards[name]) for name, one in self.rewards.items()}
        scores = {name: value.view(-1, len(plan.leaves)) for name, value in scaled.items()}
        advantage, kl_weight = self.credit(scores, plan)
        laps.mark(REWARD)
        credit = self.recipe.credit()
        sampling, training = released_calls(self.recipe, iteration, self.config.seed)
        flat = credit.zero_std_ratio(scores, weights, plan)
        told = metrics.spread(scores, weights, advantage, credit.limit * abs(credit.scale))
        told |= {"zero_std_ratio": flat, "nfe/naive_sample": sampling}
        return FlowExperience(
            figures=found.means() | told,
            every={"nfe/naive_train": training // self.recipe.updates_per_rollout},
            laps=laps,
            samples=len(found),
            unit="images",
            left_out=found.failed()[MEAN],
            reasons=found.explained(),
            rollout=blocks.rollout,
            conditioning=conditioning,
            advantage=advantage,
            kl_weight=kl_weight,
        )

    def draw_prompts(self, iteration: int) -> list[Prompt]:
        """This rank's prompts of the iteration, P."""
        return [self.prompts[place] for place in self._drawn(iteration)]

    def _drawn(self, iteration: int) -> list[int]:
        count = self.recipe.prompts_per_rollout
        drawn = draw_prompts(len(self.prompts), count, self.config.seed, iteration)
        return [drawn[slot] for slot in self.slots.tolist()]

    def sample(self, iteration: int, conditioning: Conditioning) -> Blocks:
        """The tree of every prompt: sampled as it is iterated over."""
        recipe, train = self.recipe, self.config.train
        deal = Deal.dealt(self.plans(iteration), self.slots)
        ids = moved(prompt_ids(iteration, self.slots), self.device)

        velocity = self.velocity(conditioning)
        # Where the weights move in between, or never were those that sampled.
        keeps = recipe.updates_per_rollout > 1 or recipe.sampler is not None

        def walk(layout: Layout, source: Source) -> Rollout:
            uncond = max(0, self.keep_uncond - source.first)
            keep = {"keep_velocity": keeps, "keep_uncond": uncond}
            return run(layout, velocity, source, train.max_batch, self.guidance, **keep)

        source = Source(self.config.seed, ids, self.model.latent_shape)
        return Blocks(walk, source, deal, train.prompts_per_block, self.keep_uncond)

    @property
    def keep_uncond(self) -> int:
        """Of how many prompts, the first, training takes the unconditional velocity from sampling:
        those of the first update, which the weights that sampled learn from."""
        takes = self.objective.keeps_uncond and self.recipe.sampler is None
        return len(self.slots) // self.recipe.updates_per_rollout if takes else 0

    def score(self, blocks: Blocks, prompts: Sequence[Prompt], laps: Laps) -> Scores:
        """Of the images of all ranks, prompt by prompt; sampled as they are asked for."""

        def batches() -> Iterator[tuple[Tensor, list[Prompt]]]:
            for first, latents in blocks:
                laps.mark(SAMPLING)
                asked = [prompt for prompt in prompts[first:] for _ in range(latents.shape[1])]
                latents = latents.flatten(0, 1)
                for part in slices(len(latents), self.config.train.max_batch):
                    yield self.model.decode(latents[part]), asked[part]
                del latents  # before the next block is sampled
                laps.mark(REWARD)

        group = self.slots.repeat_interleave(blocks.leaves).tolist()
        found = distributed.together(
            self.accelerator, lambda: score(self.rewards, batches(), self.stop.in_reward, group)
        )
        return Scores.joined(found)

    def credit(self, scores: dict[str, Tensor], plan: Plan) -> tuple[Tensor, Tensor | None]:
        """The advantages of all ranks, (ranks, P, C), the same for any number of ranks; and what
        the KLs of this one count."""
        credit, shape = self.recipe.credit(), (self.world, len(self.slots), -1)
        asked = scores, self.config.reward.weights, plan
        kl_weight = credit.kl_weight(*asked)
        kl_weight = None if kl_weight is None else kl_weight.view(shape)[self.rank]
        return credit(*asked).view(shape), kl_weight

    # ---- learning ----

    def batches(self, experience: FlowExperience, update: int) -> list[FlowBatch]:
        """Which sites of which prompts go through the network together: never siblings apart."""
        shares = torch.arange(len(self.slots)).tensor_split(self.recipe.updates_per_rollout)
        share, needs_all = shares[update], self.objective.needs_all
        advantage, layout = experience.advantage[:, share], experience.rollout.layout
        max_batch = self.config.train.max_batch // self.objective.together
        whole = self.objective.compares
        parts = network_batches(layout, advantage, self.rank, max_batch, needs_all, whole)
        there = ~advantage.isnan()
        total = max(1, int(there.sum())) / self.world
        teaches = bool((there & (needs_all | (advantage != 0))).any())
        on_policy = update == 0 and self.recipe.sampler is None
        looks = on_policy and self.config.train.ratio_guard is not None
        return [
            FlowBatch(
                total, teaches, experience, site, share[prompt],
                takes_part(layout, advantage[self.rank], site, prompt), looks and i == 0,
            )
            for i, (site, prompt) in enumerate(parts)
        ]  # fmt: skip

    def loss(self, batch: FlowBatch, weights: Weights) -> Outcome:
        experience = batch.experience
        advantage, kl_weight = experience.advantage[self.rank], experience.kl_weight
        where = batch.site, batch.prompt, advantage
        trained = gathered(experience.rollout, *where, weights.have_sampled, kl_weight)
        learn = self.velocity(experience.conditioning, weights.trained[NETWORK])
        # No copy that is known to equal the weights.
        names = [name for name in self.objective.anchors if not weights.is_current(name)]
        anchors = {name: self.anchor(name, experience.conditioning, weights) for name in names}
        if batch.is_replayed and isinstance(trained, StepBatch):
            said = sampled_velocity(experience.rollout, batch.site, batch.prompt)
            trained = replace(trained, sampled=said)
        out = self.objective(trained, learn, anchors)
        if isinstance(trained, StepBatch) and trained.old_velocity is not None:
            out = replace(out, parts=[*out.parts, self._by_level(out, trained, experience.rollout)])
        return out if batch.counts else out.nothing()

    def _by_level(self, out: Outcome, trained: StepBatch, rollout: Rollout) -> Parts:
        """Where the ratio is not 1 by definition."""
        sigma = trained.sigma if trained.row is None else trained.sigma[trained.row]
        there = rollout.deal.tables(self.device, rollout.source.precision).sigma
        on_host = rollout.deal.sigma.tolist()
        places = {level: on_host.index(level) for level in sorted({*on_host}, reverse=True)}
        return by_level(out, sigma, {level: there[i] for level, i in places.items()})

    def velocity(self, conditioning: Conditioning, network: nn.Module | None = None) -> Velocity:
        """Of prompts by their places, through the network that is asked; None: the model's own."""

        def velocity(x_t: Tensor, sigma: Tensor, prompt: Tensor, on_host: OnHost) -> Tensor:
            self.stop.poll()
            rows = conditioning.rows(prompt, on_host.prompt)
            levels = on_host.sigma
            return self.model.velocity(x_t, sigma, rows, network=network, sigma_host=levels)

        return velocity

    def anchor(self, name: str, conditioning: Conditioning, weights: Weights) -> Velocity:
        """Without gradient: of another version of the weights."""
        velocity = self.velocity(conditioning)

        def anchored(*where: Any) -> Tensor:
            with torch.no_grad(), weights.using(name):
                return velocity(*where)

        return anchored

    # ---- what stays ----

    def evaluate(self, step: int) -> dict[str, float]:
        return self.validation.run(step)

    def save(self, directory: Path | None) -> None:
        """The adapter's files, or the network's."""
        save_trained(self.model, self.config.lora, directory)

    def load(self, directory: Path) -> None:
        load_trained(self.model, self.config.lora, directory)
