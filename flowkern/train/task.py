"""What a training trains: a Task, by the name that a recipe has, and the batches that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from flowkern.rl.objectives import Outcome
from flowkern.train.copies import Weights
from flowkern.train.metrics import Experience

TASKS = {
    "flow": "flowkern.train.flow:FlowTask",
    "planner": "flowkern.train.planner:PlannerTask",
}
"""By the name that a recipe has; or "module:attribute" of one's own."""


@dataclass(frozen=True)
class Batch:
    """What one call of the network trains on, and what is said of its whole optimizer step; a
    Task's own has more. It is light: what it takes on the device is gathered in `Task.loss`.
    """

    total: float
    """What the summed loss is divided by: the choices of this process in the optimizer step, those
    that teach nothing included; of those that take part, where some do not, a process's share."""
    teaches: bool
    """Does the step move the weights? Of all processes: it does not where every advantage is zero
    and nothing else pulls."""


class Task(Protocol):
    """What is trained. It is made of (config, accelerator, stop, model) and refuses what it cannot
    use; model: one in memory, on the device, in place of model.path's. One that has a static
    `require(config, accelerator)` refuses there what shows before a model is looked for. Where it
    has `calls`, of the network so far on this process, and `planned(iteration)`, those of an
    iteration there by phase, "sampling" and "training", people see how far it is; in another
    `unit`, where it has one, as `done` counts it.
    """

    facts: Sequence[str]
    """What a run says of it when it begins, in lines."""
    copies: Sequence[str]
    """Of the weights, by name, that its anchors are, beside the recipe's."""

    def modules(self) -> Mapping[str, nn.Module]:
        """By name; those of their parameters that take a gradient are trained."""
        ...

    def begin(self, iteration: int) -> None:
        """What a run does once, before anything is written: with what was learned until then, and
        this iteration next."""
        ...

    def collect(self, iteration: int) -> Experience:
        """A rollout under the weights as they are, with its rewards and advantages of all ranks; a
        function of (config, iteration, weights)."""
        ...

    def batches(self, experience: Any, update: int) -> Sequence[Batch]:
        """Of optimizer step number `update` of the rollout; as many on every rank, at least one."""
        ...

    def loss(self, batch: Any, weights: Weights) -> Outcome:
        """Through `weights.trained`; anchors through `weights.using`."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """What validation.jsonl gets, under the weights as they are; empty: nothing."""
        ...

    def save(self, directory: Path | None) -> None:
        """What was learned, as the weights are, without asking other ranks; but where each has a
        part of them all are to save, and those that only give theirs get None."""
        ...

    def load(self, directory: Path) -> None:
        """What `save` wrote."""
        ...
