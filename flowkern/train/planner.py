"""The task of an agent's planner: trajectories of turns per question, rewards, and a token loss.

Q questions of a rollout, of this rank unless stated, each with G trajectories; R turns that have a
token, M tokens in all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowkern.agent.answers import load_answer
from flowkern.agent.batch import Padded, TurnBatch
from flowkern.agent.credit import TurnCredit
from flowkern.agent.engines import ENGINES, Sampling
from flowkern.agent.memory import Query
from flowkern.agent.policy import Policy
from flowkern.agent.rollout import Flow, Trajectory, roll_out, score
from flowkern.agent.system import load_system
from flowkern.checks import ConfigError
from flowkern.lookup import load
from flowkern.ops.token_loss import token_weights
from flowkern.rl.objectives import Outcome
from flowkern.train import distributed
from flowkern.train.copies import REFERENCE, Weights
from flowkern.train.distributed import Laps
from flowkern.train.language import (
    load_language,
    load_language_weights,
    save_language,
    stop_ids,
)
from flowkern.train.loop import Batch
from flowkern.train.metrics import Experience
from flowkern.train.planner_config import PlannerConfig
from flowkern.train.prompts import draw_prompts
from flowkern.train.questions import query_of, read_questions, require_kinds
from flowkern.train.stop import StopRequest
from flowkern.train.turn_figures import Told, evaluated, figures

NETWORK = "planner"  # the one module that is trained
SAMPLING, REWARD = 0, 1  # laps of `Experience`
POLL_SECONDS = 0.2
EVALUATION = -1  # in place of the number of a rollout
NO_ROW = Padded(torch.zeros(1, 1, dtype=torch.int64), *torch.zeros(4, 1, dtype=torch.int64))


@dataclass(frozen=True)
class TurnExperience(Experience):
    turns: TurnBatch
    advantage: Tensor
    """(R,) float32; weight: (M,) float32; old: (M,) float32, the log-probabilities that ratios are
    to. On the host."""
    weight: Tensor
    old: Tensor
    rows: Sequence[Tensor]
    """By the number of the optimizer step: which of this rank's rows it takes."""
    batches: Sequence[int]
    """How many calls of the network that is, on the rank with the most."""
    teaches: Sequence[bool]


@dataclass(frozen=True)
class TurnCalls(Batch):
    experience: TurnExperience
    rows: Tensor
    """(r,): those of this call; none where other ranks have more of them."""


class PlannerTask:
    """Answers `loop.Task`."""

    unit = "turn"

    @staticmethod
    def require(config: PlannerConfig, accelerator: Accelerator) -> None:
        """Raises ConfigError where the engine's server is not there, for too few questions, and for
        split weights."""
        if config.train.sharding is not None:
            raise ConfigError(
                f"train.sharding: got {config.train.sharding}, but turns of a planner differ in "
                "length from process to process, and split weights are asked for by all at once; "
                "expected null"
            )
        engine = config.agent.engine
        kind = load(engine.kind, ENGINES, "agent.engine.kind")
        if hasattr(kind, "require"):
            kind.require(engine.options)
        questions = read_questions(config.data, "train_prompts")
        distributed.require_prompts(config, accelerator, len(questions))
        require_kinds(config.validation, read_questions(config.data, "test_prompts"))

    def __init__(
        self,
        config: PlannerConfig,
        accelerator: Accelerator,
        stop: StopRequest,
        model: nn.Module | None = None,
    ) -> None:
        if model is not None:
            raise TypeError("model: a planner's is loaded from model.path; expected None")
        self.config, self.recipe = config, config.algorithm
        self.accelerator, self.stop, self.device = accelerator, stop, accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        count, updates = self.recipe.prompts_per_rollout, self.recipe.updates_per_rollout
        self.slots = distributed.share(count, self.rank, self.world, updates).tolist()
        data, agent, recipe = config.data, config.agent, self.recipe
        engine_kind = load(agent.engine.kind, ENGINES, "agent.engine.kind")
        self.questions = read_questions(data, "train_prompts")
        found = read_questions(data, "test_prompts")
        self.held_out = found[: config.validation.num_prompts]
        self.rewards = {
            name: load_answer(one.kind or name, name, **one.options)
            for name, one in config.reward.root.items()
        }
        system = load_system(agent.system, agent.modules, agent.tools, agent.prompts)
        torch.manual_seed(config.seed)
        network, self.tokenizer, trained = load_language(config, self.device)
        try:
            self.policy = Policy(network)
        except ValueError as error:
            raise ConfigError(f"model.path: {error}") from error
        self.sampling = Sampling(
            recipe.temperature,
            recipe.top_p,
            agent.max_new_tokens,
            stop_ids(self.policy.causal, self.tokenizer),
        )
        engine = engine_kind(
            agent.engine.options, model=network, tokenizer=self.tokenizer, sampling=self.sampling
        )
        limits = agent.max_turns, agent.max_prompt_tokens, agent.concurrency, agent.seconds
        self.flow = Flow(system, engine, self.tokenizer, *limits)
        self.facts = [trained, *engine.facts]
        self.trained_rows = 0  # through the network, beside the engine's
        self.done = 0
        """Turns that are over or are not needed any more, drawn and trained: see `planned`."""
        needs_copy = config.lora is None and recipe.kl_coef > 0
        self.copies = [REFERENCE] if needs_copy else []

    @property
    def temperature(self) -> float:
        """Of the policy that is trained."""
        return self.recipe.train_temperature or self.recipe.temperature

    @property
    def is_exact(self) -> bool:
        """Are the sampler's log-probabilities those that the trainer would compute? In half the
        bits they follow from what a turn is computed beside."""
        is_same = self.temperature == self.recipe.temperature
        return is_same and self.flow.engine.is_exact and self.config.train.mixed_precision == "no"

    def modules(self) -> dict[str, nn.Module]:
        return {NETWORK: self.policy}

    def begin(self, iteration: int) -> None:
        """Nothing has to be prepared."""

    # ---- collecting ----

    @property
    def calls(self) -> int:
        return self.flow.engine.calls + self.trained_rows

    def planned(self, iteration: int) -> dict[str, float]:
        """Turns of this rank, at most: one that no trajectory needs counts as done."""
        most = len(self.slots) * self.recipe.group_size * self.config.agent.max_turns
        return {"sampling": most, "training": most}

    def _passed(self, turns: int) -> None:
        self.done += turns

    def collect(self, iteration: int) -> TurnExperience:
        """A rollout of all the questions of an iteration, rewarded."""
        laps = Laps(self.device, lambda: self.calls)
        self.stop.poll()
        drawn = draw_prompts(
            len(self.questions), self.recipe.prompts_per_rollout, self.config.seed, iteration
        )
        starts = [
            (query_of(self.questions[drawn[slot]], slot), member)
            for slot in self.slots
            for member in range(self.recipe.group_size)
        ]
        self._bring_weights()
        made: list[Trajectory] = []

        def work() -> list[Told]:
            made.extend(self.trajectories(starts, self.sampling, iteration, laps))
            return [Told.of(one, self.config.reward.weights) for one in made]

        told = distributed.together(self.accelerator, work)
        laps.mark(REWARD)
        return self._experience(made, told, laps)

    def _bring_weights(self) -> None:
        """To an engine that has its own."""

        def work() -> None:
            if self.accelerator.is_main_process:
                self.flow.engine.sync(self.policy.model, Path(self.config.output_dir))

        distributed.together(self.accelerator, work)

    def trajectories(
        self,
        starts: Sequence[tuple[Query, int]],
        sampling: Sampling,
        number: int,
        laps: Laps | None = None,
    ) -> list[Trajectory]:
        """Of these questions, with their rewards."""

        async def walk() -> list[Trajectory]:
            seed = self.config.seed, number
            found = await roll_out(self.flow, starts, sampling, seed, self._passed)
            if laps is not None:
                laps.mark(SAMPLING)
            await score(found, self.rewards, self.flow.concurrency, self.flow.seconds)
            return found

        async def watched() -> list[Trajectory]:
            walking = asyncio.ensure_future(walk())
            while not walking.done():
                self.stop.poll()  # a tool or a model may take minutes
                await asyncio.wait({walking}, timeout=POLL_SECONDS)
            return walking.result()

        with self.accelerator.autocast():  # as the trainer computes
            return asyncio.run(watched())

    def _experience(
        self, made: Sequence[Trajectory], told: Sequence[Sequence[Told]], laps: Laps
    ) -> TurnExperience:
        recipe, turns = self.recipe, TurnBatch.of(made)
        mine = told[self.rank]
        reward = torch.tensor([one.reward for one in mine], dtype=torch.float64)
        group = torch.tensor([one.question for one in mine])
        options = recipe.group_by, recipe.turns, recipe.unbiased_std, recipe.eps, recipe.min_std
        advantage = TurnCredit(*options)(reward, group, turns.trajectory)
        share = torch.arange(len(mine)).tensor_split(recipe.updates_per_rollout)
        weight = torch.zeros(len(turns.sample_log_prob))
        rows, told_of_rows = [], []
        for update, part in enumerate(share):
            is_in = (turns.trajectory >= part[0]) & (turns.trajectory <= part[-1])
            of_token = is_in[turns.row]
            weight[of_token] = self.world * token_weights(
                turns.row[of_token],
                turns.trajectory[turns.row[of_token]],
                recipe.agg,
                self._total(told, update),
            )
            learns = advantage != 0
            if (recipe.kl_coef or recipe.entropy_coef) and not recipe.skip_flat:
                learns = torch.ones_like(is_in)
            rows.append((is_in & learns).nonzero().flatten())
            told_of_rows.append(len(rows[-1]))
        counts = distributed.together(self.accelerator, lambda: told_of_rows)
        most = [max(of_ranks) for of_ranks in zip(*counts, strict=True)]
        return TurnExperience(
            figures=figures([one for part in told for one in part], recipe.min_std),
            every={},
            laps=laps,
            samples=sum(map(len, told)),
            unit="trajectories",
            turns=turns,
            advantage=advantage.float(),
            weight=weight,
            old=turns.sample_log_prob if self.is_exact else self._log_prob(turns),
            rows=rows,
            batches=[max(1, -(-count // self.config.train.max_batch)) for count in most],
            teaches=[count > 0 for count in most],
        )

    def _total(self, told: Sequence[Sequence[Told]], update: int) -> float:
        """What an optimizer step's weights are divided by, over all ranks."""
        agent, updates = self.config.agent, self.recipe.updates_per_rollout
        shares = [torch.arange(len(part)).tensor_split(updates)[update].tolist() for part in told]
        count = sum(map(len, shares))
        if self.recipe.agg == "token_mean":
            pairs = zip(told, shares, strict=True)
            return max(1, sum(part[i].response for part, share in pairs for i in share))
        if self.recipe.agg == "constant":
            return count * agent.max_turns * agent.max_new_tokens
        return count

    def _log_prob(self, turns: TurnBatch) -> Tensor:
        """(M,) of the weights as they are, in the trainer's own arithmetic."""
        found = torch.zeros(len(turns.sample_log_prob))
        for rows in turns.chunks(torch.arange(len(turns)), self.config.train.max_batch):
            padded = self._on_device(turns.padded(rows))
            found[padded.token.cpu()] = self.policy.log_prob(padded, self.temperature).cpu()
            self.trained_rows += len(rows)
        return found

    def _on_device(self, padded: Padded) -> Padded:
        return Padded(*(part.to(self.device) for part in padded))

    # ---- learning ----

    def batches(self, experience: TurnExperience, update: int) -> list[TurnCalls]:
        rows, teaches = experience.rows[update], experience.teaches[update]
        share = self.planned(0)["training"] // self.recipe.updates_per_rollout
        self._passed(share - len(rows))
        parts = experience.turns.chunks(rows, self.config.train.max_batch)
        parts += [rows[:0]] * (experience.batches[update] - len(parts))
        # Weights are of all ranks already: nothing is left to be divided by.
        return [TurnCalls(1, teaches, experience, part) for part in parts]

    def loss(self, batch: TurnCalls, weights: Weights) -> Outcome:
        recipe, experience = self.recipe, batch.experience
        has_rows = len(batch.rows) > 0
        self._passed(len(batch.rows))
        padded = self._on_device(experience.turns.padded(batch.rows) if has_rows else NO_ROW)
        self.trained_rows += len(batch.rows)

        def of_tokens(values: Tensor) -> Tensor:
            if not has_rows:
                return torch.zeros(1, device=self.device)
            return values[padded.token.to(values.device)].to(self.device)

        is_on_policy = self.is_exact and weights.have_sampled
        options = {
            "temperature": self.temperature,
            "old_log_prob": None if is_on_policy else of_tokens(experience.old),
            "advantage": of_tokens(experience.advantage[experience.turns.row]),
            "token_weight": of_tokens(experience.weight),
            "entropy_coef": recipe.entropy_coef,
            "clip_low": recipe.clip_low,
            "clip_high": recipe.clip_high,
            "dual_clip": recipe.dual_clip,
        }
        if not self.is_exact and recipe.is_cap is not None:
            sampled = of_tokens(experience.turns.sample_log_prob)
            options |= {"sample_log_prob": sampled, "is_cap": recipe.is_cap}
        if recipe.kl_coef:
            options |= {"kl_coef": recipe.kl_coef}
            options["ref_log_prob"] = self._reference(padded, weights)
            self.trained_rows += len(batch.rows)
        out = weights.trained[NETWORK](padded, options)
        statistics = {
            "ratio_mean": out.ratio,
            "pg_clipfrac_higher": out.clipped & (out.ratio > 1),
            "pg_clipfrac_lower": out.clipped & (out.ratio < 1),
            "kl": out.kl,
            "entropy": out.entropy,
        }
        kept = {name: value if has_rows else value[:0] for name, value in statistics.items()}
        return Outcome(out.loss, kept)

    def _reference(self, padded: Padded, weights: Weights) -> Tensor:
        with weights.using(REFERENCE):
            return self.policy.log_prob(padded, self.temperature)

    # ---- what stays ----

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out questions, each answered once as sampled and once greedily."""
        if not self.held_out:
            return {}
        mine = range(self.rank, len(self.held_out), self.world)
        starts = [(query_of(self.held_out[place], place), 0) for place in mine]
        self._bring_weights()
        drawn = self.sampling
        found = []
        for temperature in (self.config.validation.temperature, 0.0):
            self.stop.poll()
            sampling = Sampling(temperature, 1.0, drawn.max_new_tokens, drawn.stop_ids)

            def work(sampling: Sampling = sampling) -> list[Told]:
                made = self.trajectories(starts, sampling, EVALUATION) if starts else []
                return [Told.of(one, self.config.reward.weights) for one in made]

            parts = distributed.together(self.accelerator, work)
            found.append([one for part in parts for one in part])
        return evaluated(*found) if self.accelerator.is_main_process else {}

    def save(self, directory: Path) -> None:
        """The adapter, or the network, as Hugging Face's libraries write them."""
        save_language(self.policy.model, self.tokenizer, directory)

    def load(self, directory: Path) -> None:
        load_language_weights(self.policy.model, directory)
