"""What a person sees of a run under way: on a terminal two bars, of the run and of what it does;
elsewhere a line per iteration. Of the main process alone.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flowkern.checks import counted

SHARES = {
    "timing_s/rollout": "sampling",
    "timing_s/reward": "scoring",
    "timing_s/train": "training",
}
"""Phases of an iteration, as a record has them."""
LEARNING = 3
"""A row with its backward pass, in rows without one: what is left is told by it until an iteration
has been measured."""
REFRESH = 0.1  # seconds
NAME = 10  # columns of a phase's name


class Display:
    """Where a run is. `with display:` around it; outside nothing is shown and nothing is kept."""

    def __init__(
        self, steps: int, is_main: bool, calls: Callable[[], float], unit: str = "row"
    ) -> None:
        """steps: of the whole run. calls: of the network so far, on this process, or what there is
        of another unit."""
        self._steps, self._is_main, self._calls, self._unit = steps, is_main, calls, unit
        self._is_on = False
        self._bars: Any = None
        self.seconds: Counter[str] = Counter()
        """So far, by phase."""

    # ---- where it begins and ends ----

    @contextmanager
    def running(self, step: int) -> Iterator[Display]:
        """From this optimizer step on."""
        if not self._is_main:
            yield self
            return
        self._is_on, self._first, self._step = True, step, step
        self._began = self._refreshed = time.monotonic()
        self._phase, self._planned, self._before, self._ahead = "", {}, 0.0, 1
        self._reward: float | None = None
        self._since = self._calls()
        try:
            if sys.stderr.isatty():
                with _bars() as self._bars:
                    self._run = self._bars.add_task("train", total=self._steps, said="")
                    self._now = self._bars.add_task("", total=None, said="")
                    yield self
            else:
                yield self
        finally:
            self._is_on, self._bars = False, None

    # ---- what it is told ----

    def begin(self, steps: int, planned: Callable[[], Mapping[str, float]]) -> None:
        """An iteration of so many optimizer steps. planned: calls of the network on this process by
        phase, where known."""
        if self._bars is not None:
            self._ahead, self._planned, self._before = steps, dict(planned()), 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what takes long. Of those that no record times, it takes the time."""
        if not self._is_on:
            yield
            return
        began, self._phase, self._since = time.monotonic(), name, self._calls()
        self.tick(always=True)
        try:
            yield
        finally:
            self._before += self._weight(name) * self._planned.get(name, 0)
            if name not in SHARES.values():
                passed = time.monotonic() - began
                self.seconds[name] += passed
                if self._step == self._first:  # what is left is told by what comes again
                    self._began += passed
            self._phase = ""

    def tick(self, is_scoring: bool = False, always: bool = False) -> None:
        """It goes on: to be called often."""
        if self._bars is None:
            return
        now = time.monotonic()
        if not always and now - self._refreshed < REFRESH:
            return
        self._refreshed = now
        done, planned = self._calls() - self._since, self._planned.get(self._phase)
        self._bars.update(
            self._now,
            description="scoring" if is_scoring else self._phase,
            total=planned,
            completed=min(done, planned) if planned else 0,
            said=_rows(done, planned, self._unit),
        )
        self._show()

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        """The records of an iteration, or of what is left of one."""
        if not self._is_on or not records:
            return
        for record in records:
            for key, name in SHARES.items():
                self.seconds[name] += record.get(key, 0.0)
        self._step, self._before = records[-1]["step"], 0.0
        self._planned = {}
        self._reward = records[0].get("reward/mean", self._reward)
        if self._bars is None:
            took = sum(record["timing_s/step"] for record in records)
            parts = [f"step {self._step} of {self._steps}", *self._said(), f"{took:.3g} s"]
            parts += [f"{self.shares()}", f"{_clock(self._left())} left"]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)
        else:
            self._show()

    # ---- what it shows ----

    def shares(self) -> str:
        """Of all time so far, by phase, in percent."""
        return ", ".join(self._shares(self.seconds.items()))

    def _shares(self, seconds: Iterable[tuple[str, float]]) -> list[str]:
        total = sum(self.seconds.values())
        return [f"{name} {100 * s / total:.0f} %" for name, s in seconds if s > 0]

    def _said(self) -> list[str]:
        return [] if self._reward is None else [f"reward {self._reward:.3f}"]

    def _weight(self, phase: str) -> float:
        return LEARNING if phase == "training" else 1

    def _done(self) -> float:
        """Optimizer steps, and what there is of the iteration under way."""
        planned = {name: self._weight(name) * rows for name, rows in self._planned.items()}
        if not (total := sum(planned.values())):
            return self._step
        own = self._weight(self._phase) * (self._calls() - self._since)
        now = self._before + min(own, planned.get(self._phase, 0))
        return self._step + min(1.0, now / total) * self._ahead

    def _left(self) -> float | None:
        """Seconds; None: it is not known yet."""
        done = self._done()
        if done <= self._first:
            return None
        rate = (time.monotonic() - self._began) / (done - self._first)
        return rate * (self._steps - done)

    def _show(self) -> None:
        said = [f"{self._step:,} of {counted(self._steps, 'step')}", *self._said()]
        said += [f"{_clock(self._left())} left", *self._shares(self.seconds.most_common())]
        room = self._bars.console.width - NAME - _bar_width(self._bars.console) - 2  # and two gaps
        while len(said) > 1 and len(", ".join(said)) > room:
            said.pop()  # else names and bars would be what gives way
        self._bars.update(self._run, completed=self._done(), said=", ".join(said))


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=sys.stderr, highlight=False)
    return Progress(
        TextColumn(f"{{task.description:<{NAME}}}"),
        BarColumn(bar_width=_bar_width(console)),
        TextColumn("{task.fields[said]}", markup=False),
        console=console,
        transient=True,
    )


def _bar_width(console: Any) -> int:
    return min(24, console.width // 6)


def _rows(done: float, planned: float | None, unit: str) -> str:
    if planned:
        return f"{done:,.0f} of {counted(planned, unit)}"
    return counted(done, unit) if done else ""


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
