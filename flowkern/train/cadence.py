"""When a run validates and saves, and whether it goes on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flowkern.train.distributed import on_main
from flowkern.train.errors import RunError

if TYPE_CHECKING:
    from flowkern.train.loop import Loop


class Cadence:
    """Of a loop; all processes ask, and hear the same."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._saved_at = time.monotonic()
        self.ends: str | None = None
        """Why the run ends before train.steps."""

    def is_due(self, every: int, before: int) -> bool:
        """Has the iteration that began at `before` passed a multiple of `every`, or the end?"""
        step, steps = self._loop.global_step, self._loop.config.train.steps
        return step >= steps or step // every > before // every

    def saves(self, before: int) -> bool:
        """Is a checkpoint due: by steps, by minutes, at the end?"""
        options = self._loop.config.train
        if self.is_due(options.checkpointing_steps, before) or self.ends is not None:
            return True
        minutes = options.checkpointing_minutes
        if minutes is None:
            return False

        def is_late() -> bool:
            return time.monotonic() - self._saved_at >= 60 * minutes

        return on_main(self._loop.accelerator, is_late)

    def has_saved(self) -> None:
        self._saved_at = time.monotonic()

    def judge(self) -> None:
        """After a validation: keep the best, and see whether the run goes on. Raises RunError where
        what is optimized rises at the cost of something else."""
        loop = self._loop
        options = loop.config.validation
        if options.metric is None and options.collapse is None:
            return
        found = on_main(loop.accelerator, loop.directory.verdict)
        if found is None:  # this task has no validation
            return
        step = loop.global_step
        if found.best is not None:
            if found.best["step"] == step != loop.directory.saved:
                loop.checkpoint()
            loop.directory.note_best(found.best)
        if found.alarm is not None:
            raise RunError(f"validation after step {step}: {found.alarm}")
        self.ends = found.ends
