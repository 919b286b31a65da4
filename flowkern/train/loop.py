"""The loop of every training. What is trained is a Task, which a recipe names; `Loop.step` asks it.

Data runs one way: prompts -> Experience -> Batch -> Outcome -> record. The state that is saved is
that of the last finished optimizer step, wherever a run stops. Only the main process writes, and it
needs none of the others for that.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowkern.checks import counted
from flowkern.lookup import load
from flowkern.split import gathered, whole
from flowkern.train import banner, distributed, garbage, metrics, tracking
from flowkern.train.cadence import Cadence
from flowkern.train.checkpoint import taking
from flowkern.train.config import Config
from flowkern.train.copies import Copies, Weights
from flowkern.train.display import Display
from flowkern.train.errors import RunError, describe
from flowkern.train.failures import Failures
from flowkern.train.metrics import Experience, Progress, Sums
from flowkern.train.optimizer import (
    make_optimizer,
    make_schedule,
    require_optimizer,
    restore,
    set_rate,
)
from flowkern.train.ratio_guard import RatioGuard
from flowkern.train.revision import pinned, with_data_pinned
from flowkern.train.run_directory import RunDirectory, require_place
from flowkern.train.served import require_served, served
from flowkern.train.sharding import require, saves_alone, spread
from flowkern.train.stop import Stop, StopRequest
from flowkern.train.task import TASKS, Batch, Task
from flowkern.train.teachers import places, read_copies

__all__ = ["Batch", "Loop", "Task"]

EVALUATED = "evaluated"  # the copy of the weights that ema_decay makes
SAMPLED = "sampled"  # that of those which drew the rollout, while optimizer steps follow it


class Loop:
    """Accelerator, optimizer, copies of the weights, cadence. `run` does all of it; `step` is one
    iteration.
    """

    def __init__(self, config: Config, model: Any = None) -> None:
        """model: see `Task`."""
        self.global_step = self.iteration = 0  # optimizer steps and rollouts so far
        self.updates_done = 0  # optimizer steps of the rollout under way
        self.is_whole = True  # no optimizer step is half done
        self.progress: Progress | None = None
        self.guard, self.cadence = RatioGuard(self), Cadence(self)
        self.failures = Failures(config.train.max_failed_rewards)
        require_optimizer(config)
        self.accelerator = distributed.make_accelerator(config)
        require(config, self.accelerator)
        config = with_data_pinned(config, self.accelerator)
        task: Callable[..., Task] = load(config.algorithm.task, TASKS, "algorithm: task")
        if hasattr(task, "require"):
            task.require(config, self.accelerator)
        teachers = places(config)
        require_place(config)
        config = pinned(config, self.accelerator) if model is None else config
        self.config, self.recipe = config, config.algorithm
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        is_main = self.accelerator.is_main_process
        self.stop = StopRequest(is_main and saves_alone(config), is_main)
        self.directory = RunDirectory(config, self.accelerator)
        self.task = task(config, self.accelerator, self.stop, model)
        unit = getattr(self.task, "unit", None)
        done = partial(getattr, self.task, "done" if unit else "calls", 0)
        self.display = Display(config.train.steps, is_main, done, unit or "row")
        self.stop.watch = self.display.tick
        modules = self.task.modules()
        self.processes = spread(config, self.accelerator, modules)
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.parameters, config.train)
        self.lr_scheduler = make_schedule(optimizer, config.train)
        on_host = [EVALUATED] if config.train.offload_ema else []
        names = self._names_of_copies()
        self.copies = Copies(self.parameters, names, self.processes.moved, on_host)
        wrapped = self.processes.wrap(modules)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.weights = Weights(modules, wrapped, self.copies, self.sampler)
        read_copies(self, teachers)

    def _names_of_copies(self) -> list[str]:
        names = [*self.recipe.copies, *self.task.copies]
        if self.evaluated is not None:
            names.append(EVALUATED)
        if self.recipe.updates_per_rollout > 1 and self.recipe.sampler is None:
            names.append(SAMPLED)
        return names

    @property
    def evaluated(self) -> str | None:
        """The copy of the weights that is validated; None: the weights themselves."""
        return None if self.config.train.ema_decay is None else EVALUATED

    @property
    def sampler(self) -> str | None:
        """The copy of the weights that draws the rollout; None: the weights themselves."""
        return self.recipe.sampler or (SAMPLED if SAMPLED in self.copies else None)

    # ---- one iteration ----

    def step(self) -> list[dict[str, float]]:
        """A rollout and its optimizer steps, or those that are left of them after a resume, which
        draws the rollout again; returns the metrics of each.
        """
        updates = self.recipe.updates_per_rollout
        distributed.seed_generators(self.config.seed, self.iteration, self.rank)
        if SAMPLED in self.copies and self.updates_done == 0:
            self.copies.update(SAMPLED, 0.0)
        self.display.begin(updates - self.updates_done, self._planned)
        with self.display.phase("sampling"):
            with self.weights.using(self.sampler), self.processes.drawing():
                experience = self.task.collect(self.iteration)
        for why in self.failures.note(self.iteration, experience):
            self.directory.say(f"no score: {why}", "unscored")
        self.progress = Progress(experience, is_first=self.updates_done == 0)
        with self.display.phase("training"):
            for update in range(self.updates_done, updates):
                self.learn(experience, update)
        last = self.progress.updates[-1] if self.progress.updates else {}
        decays = {n: self.recipe.decay(n, self.iteration + 1, last) for n in self.recipe.copies}
        with self.changing():
            self.iteration, self.updates_done = self.iteration + 1, 0
            for name, decay in decays.items():
                self.copies.update(name, decay)
        return self.report()

    def learn(self, experience: Experience, update: int) -> None:
        """One optimizer step of a rollout."""
        self.stop.poll()
        batches, sums = self.task.batches(experience, update), Sums()
        self.processes.agree(len(batches))
        for i, batch in enumerate(batches):
            with self.processes.joining(is_last=i == len(batches) - 1):
                out = self.task.loss(batch, self.weights)
                self.accelerator.backward(out.loss / batch.total)
            sums.add(out)
        self.progress.updates.append(self.update(sums, batches[-1]))
        experience.laps.mark()

    def _planned(self) -> dict[str, float]:
        """What people are shown the way through an iteration by."""
        return getattr(self.task, "planned", lambda iteration: {})(self.iteration)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what must happen as a whole: a state in between is never saved."""
        self.is_whole = False
        yield
        self.is_whole = True

    def update(self, sums: Sums, batch: Batch) -> dict[str, float]:
        """The optimizer step; the only place in a step where the host waits for its results.

        Where nothing teaches, the step counts, and neither weight decay nor the optimizer's moments
        see it.
        """
        options, means = self.config.train, sums.over(batch.total)
        calls = self.progress.calls()
        norm = means.new_zeros(1)
        if batch.teaches:
            self.processes.join(self.parameters)
            norm = whole(self.accelerator.clip_grad_norm_(self.parameters, options.max_grad_norm))
        several = [self.stop.flags(self.device), means.new_tensor(calls)] if self.world > 1 else []
        reduced = self.accelerator.reduce(torch.cat([means, *several]), "mean")
        grad_norm, *values = torch.cat([norm.reshape(1).to(means), reduced]).tolist()
        values, others = values[: len(means)], values[len(means) :]
        if others:
            self.stop.hear(others[:-2])
            calls = [round(self.world * mean) for mean in others[-2:]]
        loss, found = sums.named(values)
        self._require_finite(loss, grad_norm)
        self.guard.look(found)
        step, rate = self.global_step + 1, self.optimizer.param_groups[0]["lr"]
        with self.changing():
            if batch.teaches:
                self.optimizer.step()
                self.copies.weights_moved()
            set_rate(self.lr_scheduler, step)
            self.optimizer.zero_grad()
            self.global_step, self.updates_done = step, self.updates_done + 1
            if options.ema_decay is not None:
                self.copies.update(EVALUATED, min((1 + step) / (10 + step), options.ema_decay))
        self.progress.sampled, trained = calls
        self.progress.trained.append(trained)
        return {"step": step, "loss": loss, **found, "grad_norm": grad_norm, "lr": rate}

    def _require_finite(self, loss: float, grad_norm: float) -> None:
        is_scaled = self.accelerator.scaler is not None  # fp16 skips a step that overflowed
        for name, value in {"loss": loss, "gradient norm": 0.0 if is_scaled else grad_norm}.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {self.global_step + 1}: the {name} is {value}; stopped before the "
                    "weights moved; a lower train.learning_rate may help"
                )

    def report(self) -> list[dict[str, float]]:
        """The metrics of the optimizer steps that were not reported yet."""
        progress, self.progress = self.progress, None
        if progress is None or not progress.updates:
            return []
        found = metrics.records(progress, self.recipe.updates_per_rollout)
        return [r | {"memory/peak_gb": tracking.peak_memory_gb(self.device)} for r in found]

    # ---- what a checkpoint holds ----

    def save(self, directory: Path | None) -> None:
        """What was learned, the mean that is validated, and state.pt; see `Task.save`. It is what
        one process would write, however many there are and whatever each has of the weights."""
        is_written = directory is not None
        self.task.save(directory)
        if self.evaluated is not None:
            with self.weights.using(self.evaluated):
                self.task.save(directory / "ema" if is_written else None)
        scaler = self.accelerator.scaler
        state = {
            "step": self.global_step,
            "iteration": self.iteration,
            "updates_done": self.updates_done,
            "optimizer": gathered(self.optimizer.state_dict(), is_written),
            "copies": gathered(self.copies.state_dict(), is_written),
            "failures": self.failures.state_dict(),
            "rewards": served(getattr(self.task, "rewards", {})),
        } | ({"scaler": scaler.state_dict()} if scaler else {})
        if is_written:
            with (directory / "state.pt").open("wb") as file:
                torch.save(state, file)

    def load(self, directory: Path) -> None:
        """The same on every rank, however many there are and were."""
        file, is_split = directory / "state.pt", not self.processes.saves_alone
        # Each process takes its part of what may be as large as the host's memory.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_split)
        require_served(getattr(self.task, "rewards", {}), state.get("rewards", {}))
        self.copies.load_state_dict(state["copies"])
        self.task.load(directory)
        numbers = state["step"], state["iteration"], state["updates_done"]
        self.global_step, self.iteration, self.updates_done = numbers
        self.failures.load_state_dict(state.get("failures", {}))  # older ones have none
        moments = self.processes.parts(state["optimizer"], self.parameters)
        restore(self.optimizer, self.lr_scheduler, moments, self.global_step)
        self.processes.moved()
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    # ---- from the first step, or from where a run stopped, to the last ----

    def run(self) -> int:
        """Train until train.steps. Returns the exit status: 0, or 128 + a signal.

        Raises RunError where a reward, a recipe or the disk ends it; what is finished is saved.
        """
        try:
            self.begin()
            with self.stop:
                try:
                    self.advance()
                except BaseException as error:
                    return self.leave(error)
            why = f", ended early: {self.cadence.ends}" if self.cadence.ends else ""
            done = f"done: {counted(self.global_step, 'step')} in {self.directory.path}"
            self.directory.say(done + why, "done")
            distributed.finish(self.accelerator)
            self.directory.publish()
            return 0
        finally:
            self.directory.release()

    def begin(self) -> None:
        """The run directory, new or resumed."""
        found = self.directory.claim()
        if found is not None:
            with taking(found):
                self.load(found)
        self.task.begin(self.iteration)
        rewards = served(getattr(self.task, "rewards", {}))
        self.directory.prepare(found, self.global_step, rewards)
        for line in (*banner.lines(self), *self.processes.facts):
            self.directory.say(line)

    def advance(self) -> None:
        options = self.config.train
        with self.display.running(self.global_step):
            before = self.global_step - self.recipe.updates_per_rollout
            if self.updates_done == 0:
                if self.directory.is_validated(self.global_step):
                    self.cadence.judge()
                else:
                    self.validate_if_due(before)
            with garbage.found_soon():
                self.advance_to(options.steps)

    def advance_to(self, steps: int) -> None:
        while self.global_step < steps and self.cadence.ends is None:
            self.stop.poll()
            before = self.global_step - self.updates_done
            records = self.step()
            self.directory.log(records)
            self.display.log(records)
            self.stop.poll()
            self.validate_if_due(before)
            if self.cadence.saves(before):
                with self.display.phase("saving"):
                    self.checkpoint()
                    self.directory.draw_curves()
                    self.accelerator.wait_for_everyone()

    def validate_if_due(self, before: int) -> None:
        if not self.cadence.is_due(self.config.validation.steps, before):
            return
        with self.display.phase("validation"):
            with self.weights.using(self.evaluated), self.processes.drawing():
                found = self.task.evaluate(self.global_step)
            self.directory.log_validation(self.global_step, found)
        with self.display.phase("saving"):
            self.directory.draw_curves()
            self.cadence.judge()

    def leave(self, error: BaseException) -> int:
        """Save what is finished. Returns the status that a signal asks for, or raises RunError."""
        step, message, lost = self.global_step, describe(error), ""
        try:
            self.keep(is_agreed=isinstance(error, Stop))
        except Exception as second:
            if describe(second) != message:
                lost = f": {describe(second)}"
        if not self.accelerator.is_main_process:
            kept = "the first process says what is kept"
        elif step == 0:
            kept = "no step was finished, so there is nothing to continue"
        elif self.directory.saved == step:
            kept = "continue with train.resume_from_checkpoint=latest"
        else:
            stands = (
                "the last checkpoint stands" if self.directory.saved else "no checkpoint is there"
            )
            kept = f"{stands}, the state of step {step} is lost{lost}"
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.stop.signal:  # other processes may have gone already, and their work then fails
            name = signal.Signals(self.stop.signal).name
            self.directory.say(f"stopped after step {step} by {name}; {kept}", "stopped")
            return self.stop.status
        if "step " not in message:
            is_over = step >= self.config.train.steps  # what is left is to validate and to save
            message = f"{f'after step {step}' if is_over else f'step {step + 1}'}: {message}"
        self.directory.note("failed", f"{message}; {kept}")
        raise RunError(f"{message}; {kept}") from error

    def keep(self, is_agreed: bool) -> None:
        """Write the metrics and the state of the last finished step, where they are not written.
        is_agreed: does every process stop here?"""
        self.directory.log(self.report())
        if self.is_whole and self.directory.logged == self.global_step > self.directory.saved:
            if not (is_agreed or self.processes.saves_alone):
                raise RunError("each process has a part of it, and may be elsewhere")
            self.checkpoint()

    def checkpoint(self) -> None:
        self.directory.save(self.global_step, self.save, not self.processes.saves_alone)
        self.cadence.has_saved()
