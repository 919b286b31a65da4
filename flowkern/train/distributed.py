"""Processes: this one's share of the work, signals that ask it to stop, an orderly exit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from flowkern.train.config import Config, ConfigError


def make_accelerator(config: Config) -> Accelerator:
    """One process, or as many as `accelerate launch` or `torchrun` started.

    Raises ConfigError for a tracker that is not installed; accelerate would say nothing.
    """
    tracker = config.train.report_to
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        log_with=tracker,
        project_dir=config.output_dir,
        # Frozen, and as large as pos_embed; DDP otherwise sends them at every optimizer step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if tracker and not accelerator.log_with:
        raise ConfigError(f"train.report_to: {tracker!r} is not installed here")
    return accelerator


def share(prompts: int, rank: int, world: int, updates: int) -> Tensor:
    """This rank's slots of `prompts`: whole groups, as many as every other's, and such that an
    optimizer step takes the same ones however many ranks there are.

    Raises ConfigError where the ranks, or their optimizer steps, would get unequal parts.
    """
    if prompts % (world * updates):
        raise ConfigError(
            f"algorithm.prompts_per_rollout: got {prompts}, expected a multiple of {world} "
            f"processes x {updates} updates per rollout"
        )
    return torch.arange(prompts).view(updates, world, -1)[:, rank].flatten()


def agree(accelerator: Accelerator, status: int) -> int:
    """The largest `status` of all ranks: a signal may reach them in different iterations."""
    if accelerator.num_processes == 1:
        return status
    return int(gather(accelerator, torch.tensor([status], device=accelerator.device)).max())


def gather(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The rows of all ranks, in rank order, on the host: the one wait of a rollout."""
    return accelerator.gather(value).cpu()


def finish(accelerator: Accelerator) -> None:
    """Leave together; without this a process group's exit may abort."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


class StopRequest:
    """Ctrl-C and SIGTERM as a request to finish the iteration; a second Ctrl-C exits at once.

    A launcher passes one Ctrl-C on as SIGINT and SIGTERM, so SIGTERM never counts as the second.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}
        self._interrupts = 0

    @property
    def status(self) -> int:
        """The exit status asked for: 128 + the signal, or 0."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            # No unwinding: a process group would wait for ranks that are gone.
            os.write(2, b"\nstopped at once; the last checkpoint stands\n")
            os._exit(128 + number)
        if self.signal is None:
            self.signal = number
            os.write(2, b"\nfinishing this iteration, then saving; Ctrl-C again exits at once\n")


class Laps:
    """Seconds and counts between marks; CUDA events there, so that marking never waits."""

    def __init__(self, device: torch.device, count: Callable[[], int]) -> None:
        self._on_cuda, self._count = device.type == "cuda", count
        self._marks: list[tuple[Any, int]] = []
        self.mark()

    def mark(self) -> None:
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
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(times)]
        return [b - a for a, b in pairwise(times)]

    def counts(self) -> list[int]:
        """By how much the count rose in each lap."""
        return [b[1] - a[1] for a, b in pairwise(self._marks)]
