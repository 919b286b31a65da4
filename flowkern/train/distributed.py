"""Processes: this one's share of the work, what is done once for all of them, an orderly exit."""

from __future__ import annotations

import ctypes
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import LoggerType, gather_object
from torch import Tensor, nn

from flowkern.checks import counted
from flowkern.torch_private import process_groups
from flowkern.train.config import Config, ConfigError
from flowkern.train.errors import RunError, describe
from flowkern.train.launcher import end_with_launcher
from flowkern.train.prompts import draw_prompts
from flowkern.train.stop import Stop

Found = TypeVar("Found")


def make_accelerator(config: Config) -> Accelerator:
    """One process, or as many as `accelerate launch` or `torchrun` started.

    Raises ConfigError for a tracker that there is not, or that is not installed.
    """
    end_with_launcher()
    tracker = config.train.report_to
    if tracker is not None and tracker not in LoggerType.list():
        known = ", ".join(LoggerType.list())
        raise ConfigError(f"train.report_to: got {tracker!r}, expected one of {known}")
    # Of torchrun's processes without a GPU accelerate makes as many runs of one, if not told.
    is_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    with warnings.catch_warnings(action="ignore"):  # of that tracker, in two lines
        accelerator = Accelerator(
            cpu=is_on_cpu,
            mixed_precision=config.train.mixed_precision,
            log_with=tracker,
            project_dir=config.output_dir,
            # Buffers are frozen, and as large as pos_embed; DDP otherwise sends them at every
            # optimizer step. A gradient is a view of what is sent, not a second copy of it.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
    if tracker and not accelerator.log_with:
        extras = {"tensorboard": "'flowkern[tensorboard]'", "all": "a tracker"}
        how = extras.get(tracker, tracker.replace("_", "-"))
        raise ConfigError(f"train.report_to: {tracker!r} is not installed here: pip install {how}")
    return accelerator


class Replicas:
    """Processes that have all weights each: DistributedDataParallel means gradients as the last
    backward pass of an optimizer step makes them. `sharding.Sharded` is the other way."""

    facts: Sequence[str] = ()
    """What a run says of it when it begins, in lines; to be asked for on every process."""
    saves_alone = True
    """Has the main process all that a checkpoint holds?"""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._trained: list[nn.Module] = []

    def wrap(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """As gradients need them."""
        self._trained = [self.accelerator.prepare(module) for module in modules.values()]
        return dict(zip(modules, self._trained, strict=True))

    @contextmanager
    def joining(self, is_last: bool) -> Iterator[None]:
        """Around a backward pass: the last of an optimizer step joins the gradients of all."""
        with ExitStack() as stack:
            for module in () if is_last else self._trained:
                stack.enter_context(self.accelerator.no_sync(module))
            yield

    def join(self, parameters: Sequence[Tensor]) -> None:
        """The gradients, where no backward pass has."""

    def agree(self, calls: int) -> None:
        """Before so many passes of an optimizer step."""

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Around passes between which no weight moves."""
        yield

    def moved(self) -> None:
        """To be told where weights changed otherwise than by an optimizer."""

    def parts(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """An optimizer's whole state, as it is for these parameters."""
        return state


def share(prompts: int, rank: int, world: int, updates: int) -> Tensor:
    """This rank's slots of `prompts`: whole groups, as many as every other's, and such that an
    optimizer step takes the same ones however many ranks there are.

    Raises ConfigError where the ranks, or their optimizer steps, would get unequal parts.
    """
    if prompts % (world * updates):
        raise ConfigError(
            f"algorithm.prompts_per_rollout: got {prompts}, expected a multiple of "
            f"{counted(world, 'process')} x {counted(updates, 'update')} per rollout"
        )
    return torch.arange(prompts).view(updates, world, -1)[:, rank].flatten()


def require_prompts(config: Config, accelerator: Accelerator, available: int) -> None:
    """Raise ConfigError where a rollout takes more prompts than there are, or processes would get
    unequal parts of them."""
    recipe, count = config.algorithm, config.algorithm.prompts_per_rollout
    draw_prompts(available, count, config.seed, 0)
    share(count, accelerator.process_index, accelerator.num_processes, recipe.updates_per_rollout)


def together(accelerator: Accelerator, work: Callable[[], Found]) -> list[Found]:
    """What `work` returns on every rank, in rank order, on all of them.

    What it raises on one rank ends all of them, which otherwise would wait for it for ever.
    """
    if accelerator.num_processes == 1:
        return [work()]
    found, failure = None, None
    try:
        found = work()
    except Stop:
        raise
    except BaseException as raised:
        failure = raised
    everyone = gather_object([(found, failure and describe(failure))])
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise RunError(f"process {rank}: {message}")
    return [part for part, _ in everyone]


def seed_generators(seed: int, number: int, rank: int) -> None:
    """The global generators, for an iteration: the noise needs none, but a reward of the user's
    own may. They follow from the arguments, so nothing of them has to be stored.
    """
    state = np.random.SeedSequence([seed, number, rank]).generate_state(2, np.uint64)
    random.seed(int(state[0]))
    np.random.seed(state[:1].view(np.uint32))
    torch.manual_seed(int(state[1] >> np.uint64(1)))


def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, on every process. Its failure is raised there,
    and ends the others without a word.
    """
    found: list[Any] = [None, 0]
    error = None
    if accelerator.is_main_process:
        try:
            found[0] = function()
        except Exception as raised:
            error, found[1] = raised, 2 if isinstance(raised, ConfigError) else 1
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    if error is not None:
        raise error
    if found[1]:
        raise SystemExit(found[1])
    return found[0]


def finish(accelerator: Accelerator) -> None:
    """Leave together; without this a process group's exit may abort.

    Gloo's group waits, when it goes, for its threads, and one that still has a tensor of the last
    collective waits for the interpreter's lock: where Python lets go of the group, which holds
    that lock, neither goes on. So Python never does.
    """
    accelerator.wait_for_everyone()
    for group in process_groups() if accelerator.num_processes > 1 else ():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    accelerator.end_training()


class Laps:
    """Seconds and counts of laps; CUDA events there, so that marking never waits."""

    def __init__(self, device: torch.device, count: Callable[[], int]) -> None:
        self._on_cuda, self._count = device.type == "cuda", count
        self._marks: list[tuple[Any, int]] = []
        self._laps: list[int] = []
        self._note()

    def mark(self, lap: int | None = None) -> None:
        """What has passed since the last mark belongs to this lap; None: to a new one."""
        self._laps.append(max(self._laps, default=-1) + 1 if lap is None else lap)
        self._note()

    def _note(self) -> None:
        if self._on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((now, self._count()))

    def seconds(self) -> list[float]:
        """Of each lap. Waits for the device: to be called once, at the end."""
        times = [mark[0] for mark in self._marks]
        if self._on_cuda:
            times[-1].synchronize()
            return self._sums([a.elapsed_time(b) / 1000 for a, b in pairwise(times)])
        return self._sums([b - a for a, b in pairwise(times)])

    def counted(self) -> int:
        """By how much the count rose since the last mark."""
        return self._count() - self._marks[-1][1]

    def counts(self) -> list[int]:
        """By how much the count rose in each lap."""
        return self._sums([b[1] - a[1] for a, b in pairwise(self._marks)])

    def _sums(self, parts: list[Any]) -> list[Any]:
        sums = [0] * (1 + max(self._laps, default=-1))
        for lap, part in zip(self._laps, parts, strict=True):
            sums[lap] += part
        return sums
