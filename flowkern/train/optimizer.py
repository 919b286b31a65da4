"""AdamW and its schedule, as configured: also on a resume, which keeps only what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from flowkern.train.config import TrainConfig


def make_optimizer(parameters: Sequence[Tensor], options: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )


def make_schedule(optimizer: torch.optim.Optimizer, options: TrainConfig) -> LambdaLR:
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.steps,
    )


def restore(optimizer: Any, schedule: LambdaLR, state: dict[str, Any], step: int) -> None:
    """The moments of `state`, with the settings and the schedule that `optimizer` and `schedule`
    were made with, at `step`.
    """
    made = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, made, strict=True):
        group |= settings
    set_rate(schedule, step)


def set_rate(schedule: LambdaLR, step: int) -> None:
    """That of the optimizer step which follows `step` of them. `schedule.step` counts for itself,
    and warns where its first call follows an optimizer step that was left out.
    """
    schedule.last_epoch = step
    groups = schedule.optimizer.param_groups
    for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(step)
