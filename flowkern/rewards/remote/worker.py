"""One reward in a thread of its own, and what waits for it, merged to calls of up to a batch."""

from __future__ import annotations

import copy
import queue
import threading
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowkern.rewards import Reward, Unscored
from flowkern.rewards.remote.protocol import Refused
from flowkern.rewards.scores import real_numbers, scores_and_info, takes_group


@dataclass(frozen=True)
class Scored:
    """Of some images, on the host."""

    scores: list[float]
    """NaN where there is none."""
    info: dict[str, list[float]]
    reason: str | None = None
    """Why there is none of all of them."""


@dataclass(frozen=True)
class Job:
    """Images of one size, to be scored together: of one request."""

    images: Sequence[Tensor] = field(repr=False)
    """uint8 (3, H, W) or (F, 3, H, W) each."""
    prompts: Sequence[str]
    metadata: Sequence[dict[str, Any]]
    group: Sequence[int] | None = None
    done: Future[Scored] = field(default_factory=Future, repr=False)


Parts: TypeAlias = Sequence[tuple[Sequence[int], Future[Scored]]]
"""(places of images in their request, what becomes of them)."""


class Worker:
    """Scores jobs one after another, those that wait and fit in one call of at most `batch` images.

    A reward that takes groups gets each job by itself, whole.
    """

    def __init__(self, name: str, reward: Reward, batch: int = 32) -> None:
        self.name, self.reward, self.batch = name, reward, batch
        self.takes_group = takes_group(reward)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._held: Job | None = None
        self._calling: Sequence[Job] = ()
        self._is_closed = False
        # A call that does not come back does not keep the process.
        threading.Thread(target=self._work, name=f"reward {name}", daemon=True).start()

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    def score(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        group: Sequence[int] | None,
    ) -> Parts:
        """All images of a request, in as many calls as they need.

        Raises Refused where groups are wanted and there are none, or no one call can hold them.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            places.setdefault(tuple(image.shape), []).append(i)
        if self.takes_group:
            wanted = "expected one id per image, equal for images of one prompt"
            if group is None:
                raise Refused(422, "wrong_field", f"group: {self.name} takes it; {wanted}")
            if len(places) > 1:
                raise Refused(422, "wrong_shape", f"images: {self.name} takes one size a request")
        out = []
        for same in places.values():
            size = len(same) if self.takes_group else self.batch
            for part in (same[i : i + size] for i in range(0, len(same), size)):
                job = Job(
                    [images[i] for i in part],
                    [prompts[i] for i in part],
                    [metadata[i] for i in part],
                    [group[i] for i in part] if self.takes_group and group is not None else None,
                )
                out.append((part, job.done))
                self._jobs.put(job)
        if self._is_closed:
            self.close()
        return out

    def close(self) -> None:
        """What is not scored yet is refused, and the thread ends after the call that it is in."""
        self._is_closed = True
        left = [*self._calling, *filter(None, [self._held])]
        while not self._jobs.empty():
            left += filter(None, [self._jobs.get()])
        self._jobs.put(None)
        for job in left:
            _set(job, Refused(503, "closing", "the server is shutting down"))

    def _work(self) -> None:
        while (job := self._held or self._jobs.get()) is not None:
            self._held = None
            self._calling = self._merged(job)
            self._finish(self._calling)
            self._calling = ()

    def _merged(self, first: Job) -> list[Job]:
        """It, and those behind it that fit."""
        jobs, count = [first], len(first.images)
        while not self.takes_group and not self._jobs.empty():
            job = self._jobs.get()
            if job is None:
                self._jobs.put(None)
                break
            count += len(job.images)
            if count > self.batch or job.images[0].shape != first.images[0].shape:
                self._held = job
                break
            jobs.append(job)
        return jobs

    def _finish(self, jobs: Sequence[Job]) -> None:
        try:
            found = self._call(jobs)
        except BaseException as error:  # CancelledError, too: the thread serves all that follows
            if len(jobs) > 1:  # one request's fault is not another's
                for job in jobs:
                    self._finish([job])
                return
            _set(jobs[0], self._failure(error, len(jobs[0].images)))
            return
        begin = 0
        for job in jobs:
            part = slice(begin, begin := begin + len(job.images))
            _set(job, Scored(found.scores[part], {k: v[part] for k, v in found.info.items()}))

    def _call(self, jobs: Sequence[Job]) -> Scored:
        """The reward of all of them at once, as a training calls it."""
        images = torch.stack([image for job in jobs for image in job.images]).float().div_(255)
        prompts = [text for job in jobs for text in job.prompts]
        metadata = [copy.deepcopy(one) for job in jobs for one in job.metadata]
        count = len(images)  # now: what is given is the reward's own, to write into
        more = {"group": list(jobs[0].group or ())} if self.takes_group else {}
        with torch.no_grad():
            found, entries = scores_and_info(self.reward(images, prompts, metadata, **more))
        try:
            scores = real_numbers(found, count).tolist()
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"returned {error}; expected {count} numbers, one per image"
            ) from error
        info = {}
        for name, values in entries.items():
            try:
                info[str(name)] = real_numbers(values, count).tolist()
            except (ValueError, TypeError, RuntimeError, OverflowError):
                said = "is not one real number per image, and not reported"
                warnings.warn(f"{self.name}: info {name!r} {said}", stacklevel=2)
        return Scored(scores, info)

    def _failure(self, error: BaseException, count: int) -> Scored | Refused:
        """An outside reason leaves images without a score; else it is the reward's own fault, which
        the log has in full and the answer in a line."""
        if isinstance(error, Unscored):
            return Scored([float("nan")] * count, {}, str(error))
        traceback.print_exception(error)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Refused(500, "reward_failed", f"{self.name}: {said:.300}")


def _set(job: Job, what: Scored | Refused) -> None:
    """A call may come back after its jobs were given up."""
    with suppress(InvalidStateError):
        if isinstance(what, Refused):
            job.done.set_exception(what)
        else:
            job.done.set_result(what)
