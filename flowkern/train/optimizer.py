"""AdamW and its schedule, as configured: also on a resume, which keeps only what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from flowkern.train.config import Config, ConfigError, TrainConfig

EXTRA = "torchao"
"""What 8 bits take; bitsandbytes' have no DTensor, as which weights are sharded."""


def require_optimizer(config: Config) -> None:
    """Raise ConfigError where train.optimizer is not for what is trained, or not installed."""
    key, kind = "train.optimizer", config.train.optimizer
    if kind != "adamw_8bit":
        return
    if config.lora is not None:
        raise ConfigError(
            f"{key}: got {kind}, which is for lora=null: an adapter has few weights, and small "
            "ones keep moments in float32; expected adamw or adamw_fused"
        )
    if find_spec(EXTRA) is None:
        raise ConfigError(f"{key}: {kind} needs {EXTRA}: pip install 'flowkern[{EXTRA}]'")


def make_optimizer(parameters: Sequence[Tensor], options: TrainConfig) -> torch.optim.Optimizer:
    """The AdamW of train.optimizer, which `require_optimizer` has let pass."""
    kind, own = torch.optim.AdamW, {}
    if options.optimizer == "adamw_fused":
        own = {"fused": True}
    elif options.optimizer == "adamw_8bit":
        from torchao.optim import AdamW8bit as kind
    return kind(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        **own,
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
    # Theirs before they are loaded: where a moment goes follows from them, as from `fused`.
    groups = [one | own for one, own in zip(state["param_groups"], made, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    set_rate(schedule, step)


def set_rate(schedule: LambdaLR, step: int) -> None:
    """That of the optimizer step which follows `step` of them. `schedule.step` counts for itself,
    and warns where its first call follows an optimizer step that was left out.
    """
    schedule.last_epoch = step
    groups = schedule.optimizer.param_groups
    for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        if isinstance(group["lr"], Tensor):  # torchao's, which is compiled with it
            group["lr"].fill_(rate * factor(step))
        else:
            group["lr"] = rate * factor(step)
