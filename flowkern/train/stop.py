"""Signals that ask a run to stop: it stops where it is, and what is finished is saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    """Leaves an iteration between two of its network calls, or a reward wherever it is."""


class StopRequest:
    """SIGINT (Ctrl-C), SIGTERM and SIGHUP as a request; a second Ctrl-C exits at once.

    A launcher passes one Ctrl-C on as SIGINT and SIGTERM, so SIGTERM never counts as the second.
    acts_alone: this process may leave the others' work at any moment, because it is the one that
    saves. The others go on until all have heard of it at the end of an optimizer step, or until
    the one that saves is gone.
    """

    def __init__(self, acts_alone: bool = True, speaks: bool = True) -> None:
        """speaks: this process says what it does about a signal."""
        self.watch: Callable[[bool], None] = lambda is_scoring: None
        """Told whenever it is asked, and whether that is for a reward."""
        self.signal: int | None = None
        self.is_agreed = False
        """Does every process know of it?"""
        self._acts_alone, self._speaks, self._in_reward = acts_alone, speaks, False
        self._previous: dict[int, object] = {}
        self._interrupts = 0

    @property
    def status(self) -> int:
        """The exit status asked for: 128 + the signal, or 0."""
        return 128 + self.signal if self.signal else 0

    def poll(self) -> None:
        """To be asked wherever nothing is half changed. Raises Stop."""
        self.watch(False)
        if self.signal and (self._acts_alone or self.is_agreed):
            raise Stop

    @contextmanager
    def in_reward(self) -> Iterator[None]:
        """Around foreign code that may take long and changes nothing of the run's: the signal's
        handler itself raises Stop there.
        """
        self.poll()
        self.watch(True)
        self._in_reward = self._acts_alone
        try:
            yield
        finally:
            self._in_reward = False

    def flags(self, device: torch.device) -> Tensor:
        """One number per signal, not 0 for the one that arrived: to be reduced over processes."""
        return torch.tensor([float(self.signal == s) for s in SIGNALS], device=device)

    def hear(self, flags: list[float]) -> None:
        """The reduced flags: the same on every process."""
        heard = [s for s, flag in zip(SIGNALS, flags, strict=True) if flag > 0]
        if heard:
            self.signal, self.is_agreed = max(heard), True

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # as nohup starts a command
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            # No unwinding: a process group would wait for ranks that are gone.
            os.write(2, b"\nstopped at once; what was saved before stands\n")
            os._exit(128 + number)
        if self.signal is None:
            self.signal = number
            if self._speaks:
                os.write(2, b"\nsaving the last finished step; Ctrl-C again exits at once\n")
            if self._in_reward:
                raise Stop
