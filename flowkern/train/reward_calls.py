"""One call of a reward: with arguments of its own, in its time, checked; in this thread or, where a
reward waits for another machine, in one of a few beside it.

B images, or B videos. Whatever a reward does wrong becomes a RewardError whose message begins with
its key; what it could not score for a reason outside of this process is NaN.
"""

from __future__ import annotations

import copy
import queue
import signal
import threading
import time
import traceback
import warnings
from asyncio import CancelledError
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkern.rewards import Reward, RewardError, Unscored
from flowkern.rewards.scores import real_numbers, scores_and_info, takes_group
from flowkern.train.prompts import Prompt

THREADS = 4
AHEAD = 2 * THREADS
"""Calls that may be under way or wait, beyond which sampling waits: each has images."""


@dataclass(frozen=True)
class KeyedReward:
    """A reward, and where the configuration has it; called, it is that reward."""

    key: str
    weight: float
    """In what is optimized; 0: only reported."""
    reward: Reward
    timeout: float | None = None
    """Seconds of a call."""
    scale: tuple[float, float] = (1.0, 0.0)
    """Factor and offset: what is optimized is score * factor + offset."""
    may_be_nan: bool = False
    """Is NaN an image without a score, and not a mistake of the reward's?"""
    commits: Mapping[str, str] = field(default_factory=dict)
    """Of its files on the hub, by id."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Prompt], **more: Any
    ) -> Any:
        return self.reward(images, prompts, metadata, **more)

    def scaled(self, scores: Tensor) -> Tensor:
        """What is optimized, of raw scores."""
        factor, offset = self.scale
        return scores * factor + offset

    @property
    def overlaps(self) -> bool:
        """Does it wait for others, and lets sampling go on meanwhile?"""
        return bool(getattr(self.reward, "overlaps", False))

    @property
    def takes_bytes(self) -> bool:
        """Does it make bytes of images at once, so that it may get these?"""
        return bool(getattr(self.reward, "takes_bytes", False))

    @property
    def by_group(self) -> bool:
        """Is it to see whole groups, and told which image is of which?"""
        return takes_group(self.reward)


@dataclass(frozen=True)
class Answer:
    """What a reward says of B images: (B,) float64 each."""

    scores: Tensor
    """NaN: none."""
    info: dict[str, Tensor]
    """By entry."""
    reason: str | None = None
    """Why there are no scores at all, beginning with the reward's key."""


@dataclass(frozen=True)
class Call:
    """Of a reward, with what is its own to write into."""

    reward: KeyedReward
    images: Tensor
    prompts: list[str]
    metadata: list[Prompt]
    more: dict[str, Any]

    @classmethod
    def of(
        cls,
        reward: KeyedReward,
        images: Tensor,
        prompts: Sequence[Prompt],
        group: Sequence[int] | None = None,
    ) -> Call:
        """group: a number for each image; in the metadata, and given to a reward that takes it."""
        texts = [prompt["prompt"] for prompt in prompts]
        mine = [copy.deepcopy(prompt) for prompt in prompts]  # siblings share one
        for prompt, number in zip(mine, group or (), strict=False):
            prompt.setdefault("group", number)
        more = {"group": list(group)} if reward.by_group and group is not None else {}
        return cls(reward, images.clone(), texts, mine, more)

    def ask(self) -> Answer:
        """Here. Raises RewardError for a reward that fails, leaves (sys.exit), does not return in
        its time or not one real number per image. Whether they are finite is for others to see.
        """
        with _at_most(self.reward.timeout, self.reward.key):
            return self.answer()

    def answer(self) -> Answer:
        """As `ask`, however long it takes."""
        reward, count, device = self.reward, len(self.images), self.images.device
        try:
            with torch.no_grad():
                found = reward(self.images, self.prompts, self.metadata, **self.more)
        except Unscored as error:
            none = torch.full((count,), torch.nan, dtype=torch.float64, device=device)
            return Answer(none, {}, f"{reward.key}: {' '.join(str(error).split())}")
        except (Exception, SystemExit, CancelledError) as error:
            raise RewardError(f"{reward.key}: {line(error)}") from error
        found, entries = scores_and_info(found)
        try:
            scores = real_numbers(found, count).to(device)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            what = " ".join(str(error).split())
            raise RewardError(
                f"{reward.key}: returned {what}; expected {count} real numbers, one per image"
            ) from error
        info = {}
        for entry, value in entries.items():
            try:
                info[str(entry)] = real_numbers(value, count).to(device)
            except (ValueError, TypeError, RuntimeError, OverflowError):
                warnings.warn(
                    f"{reward.key}: info {entry!r} is not one real number per image, and not "
                    "reported",
                    stacklevel=2,
                )
        return Answer(scores, info)


# ---- beside what goes on ----


class Begun:
    """A call in another thread."""

    def __init__(self, call: Call) -> None:
        self.reward, self._future = call.reward, Future[Answer]()
        self._call: Call | None = call
        self._since: float | None = None

    def work(self) -> None:
        """In that thread."""
        self._since = time.monotonic()
        call, self._call = self._call, None  # its images are freed when it ends
        try:
            self._future.set_result(call.answer())
        except BaseException as error:
            self._future.set_exception(error)

    def is_done(self) -> bool:
        return self._future.done()

    def wait(self) -> Answer:
        """Its answer; raises what `Call.ask` does. Time counts from where the call began."""
        limit = self.reward.timeout
        while limit is not None and not self._future.done():
            left = limit if self._since is None else self._since + limit - time.monotonic()
            if left <= 0:
                raise _late(self.reward.key, limit)
            with suppress(TimeoutError):
                self._future.result(left)
        return self._future.result()


class Threads:
    """A few, in which calls are begun one after another, as they were given. They keep no process
    from ending, so that one that never returns does not."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Begun | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def begin(self, call: Call) -> Begun:
        begun = Begun(call)
        if len(self._threads) < THREADS:
            self._threads.append(threading.Thread(target=self._run, daemon=True))
            self._threads[-1].start()
        self._calls.put(begun)
        return begun

    def _run(self) -> None:
        while (begun := self._calls.get()) is not None:
            begun.work()

    def close(self) -> None:
        """What has not begun never will; what has is not waited for."""
        with suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)


# ---- time ----


class _Late(BaseException):
    """Leaves a reward wherever it is, as Stop does: no `except Exception` of its own holds it."""


def _late(key: str, seconds: float) -> RewardError:
    return RewardError(f"{key}: did not return within {seconds:g} s, its timeout")


@contextmanager
def _at_most(seconds: float | None, key: str) -> Iterator[None]:
    """Raises RewardError where the interpreter is when the time is over: not inside of a call of C
    that does not come back. In the main thread alone; None: no limit.
    """
    if seconds is None:
        yield
        return

    def is_over(*_) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, is_over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Late:
        raise _late(key, seconds) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def line(error: BaseException) -> str:
    """What was raised and where, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text:.300} (at {Path(frames[-1].filename).name}:{frames[-1].lineno})"
