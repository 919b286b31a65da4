"""A run from its first step, or from where it stopped, to its last: files, cadence, signals, ends.

The state that is saved is that of the last finished optimizer step, wherever a run stops. Only the
main process writes, and it needs none of the others for that.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowkern.train import checkpoint, distributed, durable, run_directory, tracking
from flowkern.train.config import ConfigError, to_dict
from flowkern.train.errors import RunError, describe
from flowkern.train.lock import Lock
from flowkern.train.run_directory import METRICS, VALIDATION

PROMPTS = "prompts.json"  # of a checkpoint


class Run:
    """The run of a trainer: see `go`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.accelerator, self.stop = trainer.accelerator, trainer.stop
        self.output_dir = Path(self.config.output_dir)
        self.is_main = self.accelerator.is_main_process
        self.saved = self.logged = 0  # the steps of the newest checkpoint, of the last metrics
        self.taken: dict[str, tuple[Any, Any]] = {}
        self.lock: Lock | None = None

    def go(self) -> int:
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
            return self.finish()
        finally:
            if self.lock is not None:
                self.lock.release()

    def advance(self) -> None:
        trainer, options = self.trainer, self.config.train
        bar = tracking.progress_bar(options.steps, trainer.global_step, self.is_main)
        with bar:
            before = trainer.global_step - self.config.algorithm.updates_per_rollout
            if trainer.updates_done == 0 and not self.is_validated():
                self.validate_if_due(before)
            while trainer.global_step < options.steps:
                self.stop.poll()
                before = trainer.global_step - trainer.updates_done
                records = trainer.step()
                self.log(records)
                bar.update(len(records))
                if "reward/mean" in records[0]:
                    bar.set_postfix(reward=f"{records[0]['reward/mean']:.3f}")
                self.stop.poll()
                self.validate_if_due(before)
                if self.is_due(options.checkpointing_steps, before):
                    self.save()
                    self.draw_curves()
                    self.accelerator.wait_for_everyone()

    def finish(self) -> int:
        self.say(f"done: {self.trainer.global_step} steps in {self.output_dir}")
        distributed.finish(self.accelerator)
        return 0

    def leave(self, error: BaseException) -> int:
        """Save what is finished. Returns the status that a signal asks for, or raises RunError."""
        step, message, lost = self.trainer.global_step, describe(error), ""
        try:
            self.keep()
        except Exception as second:
            if describe(second) != message:
                lost = f": {describe(second)}"
        if step == 0:
            kept = "no step was finished, so there is nothing to continue"
        elif self.saved == step:
            kept = "continue with train.resume_from_checkpoint=latest"
        else:
            kept = f"the last checkpoint stands, the state of step {step} is lost{lost}"
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.stop.signal:  # other processes may have gone already, and their work then fails
            self.say(f"stopped after step {step}; {kept}")
            return self.stop.status
        if "step " not in message:
            message = f"step {step + 1}: {message}"
        raise RunError(f"{message}; {kept}") from error

    def keep(self) -> None:
        """Write the metrics and the state of the last finished step, where they are not written."""
        trainer = self.trainer
        self.log(trainer.report())
        if trainer.is_whole and self.logged == trainer.global_step > self.saved:
            self.save()

    # ---- beginning ----

    def begin(self) -> None:
        """The run directory, new or resumed."""
        trainer, options, tree = self.trainer, self.config.train, to_dict(self.config)
        found = distributed.on_main(self.accelerator, lambda: self._claim(tree))
        if found is not None:
            with checkpoint.taking(Path(found)):
                trainer.load(Path(found))
            self.logged = trainer.global_step
            self.saved = self.logged if self._is_mine(found) else 0
        distributed.on_main(self.accelerator, lambda: self._prepare(found, tree))
        if options.report_to:
            self.accelerator.init_trackers("flowkern", config=tracking.flat(tree))

    def _claim(self, tree: dict[str, Any]) -> str | None:
        """The checkpoint to continue from; what can be refused is refused here, before a change."""
        name = self.config.train.resume_from_checkpoint
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(self.output_dir)
        except OSError as error:
            if error.errno is None:  # another run has it
                raise
            raise ConfigError(
                f"output_dir: {error.strerror}: {str(error.filename)!r:.300}"
            ) from error
        found = checkpoint.find_checkpoint(name, self.output_dir) if name else None
        if found is None:
            return None
        prompts = self._prompts()
        with checkpoint.taking(found):
            self.taken = run_directory.refuse_other_run(found, tree)
            stored = dict(json.loads((found / PROMPTS).read_bytes()))
        for key, digest in prompts.items():
            if stored.get(key) != digest:
                raise ConfigError(
                    f"{key}: holds other prompts than when the run that is resumed began; "
                    "expected the same, or a new output_dir"
                )
        return str(found)

    def _prepare(self, found: str | None, tree: dict[str, Any]) -> None:
        options, step = self.config.train, self.trainer.global_step
        if found is not None and self._is_mine(found):
            run_directory.resume(self.output_dir, Path(found), step, tree)
        else:
            is_restart = options.resume_from_checkpoint == "latest"
            run_directory.begin(self.output_dir, options.overwrite_output_dir, is_restart)
        durable.replace(self.output_dir / run_directory.CONFIG, run_directory.dump(tree))
        if found is not None:
            self.say(f"resumed from {found}")
            for key, (old, new) in self.taken.items():
                self.say(f"  {key}: {old} until step {step}, {new} from there")

    def _is_mine(self, found: str) -> bool:
        """Is it a checkpoint of this directory, and not of a run that is taken further here?"""
        return Path(found).resolve().parent == self.output_dir.resolve()

    def _prompts(self) -> dict[str, str | None]:
        """A digest of each file of prompts, wherever it lies."""
        data = self.config.data
        paths = {"data.train_prompts": data.train_prompts, "data.test_prompts": data.test_prompts}
        return {
            key: path and hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for key, path in paths.items()
        }

    # ---- cadence and files ----

    def is_due(self, every: int, before: int) -> bool:
        """Has the iteration that began at `before` passed a multiple of `every`, or the end?"""
        step = self.trainer.global_step
        return step >= self.config.train.steps or step // every > before // every

    def validate_if_due(self, before: int) -> None:
        trainer = self.trainer
        if not self.is_due(self.config.validation.steps, before):
            return
        trainer.model.network = trainer.network
        with trainer.copies.using(trainer.evaluated):
            trainer.validation.run(trainer.global_step)
        self.draw_curves()

    def is_validated(self) -> bool:
        """Is this step's validation written? A run that was stopped before it makes up for it."""
        path, step = self.output_dir / VALIDATION, self.trainer.global_step
        return distributed.on_main(
            self.accelerator, lambda: any(r["step"] == step for r in durable.read_lines(path))
        )

    def save(self) -> None:
        """checkpoint-N, whole or not at all; by the main process alone."""
        step = self.trainer.global_step
        if self.is_main:
            limit = self.config.train.checkpoints_total_limit
            checkpoint.write(self.output_dir, step, self._fill, limit)
        self.saved = step

    def _fill(self, directory: Path) -> None:
        self.trainer.save(directory)
        (directory / run_directory.CONFIG).write_text(
            run_directory.dump(to_dict(self.config)), "utf-8"
        )
        (directory / PROMPTS).write_text(json.dumps(self._prompts()))

    def draw_curves(self) -> None:
        """reward_curve.png of what is on disk."""
        if self.is_main:
            lines = [self.output_dir / name for name in (METRICS, VALIDATION)]
            tracking.save_curves(
                self.output_dir / "reward_curve.png",
                *map(durable.read_lines, lines),
                optimized=self.config.reward.weights,
            )

    def log(self, records: Sequence[dict[str, float]]) -> None:
        for record in records:
            if self.is_main:
                durable.append_line(self.output_dir / METRICS, record)
            self.logged = record["step"]
            self.accelerator.log(record, step=record["step"])

    def say(self, message: str) -> None:
        if self.is_main:
            print(message, file=sys.stderr, flush=True)
