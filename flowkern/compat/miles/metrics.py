"""What MILES's losses are given, and report by `emit_mean` and `emit_max` of its metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def emit_means(metrics, sums: Mapping[str, Tensor], count: int) -> None:
    """Means over `count` samples, by name."""
    for name, total in sums.items():
        metrics.emit_mean(name, total=total, count=count)


def emit_model_output(metrics, ctx, batch: list[dict], prepared, new_pred: Tensor) -> None:
    """How far the velocity is from the rollout's, where --diffusion-debug-mode has brought it."""
    rollout = of_rollout(batch, "rollout_step_model_output", new_pred)
    if rollout is None:
        return
    away = (new_pred.float().flatten(1) - rollout.flatten(1)).abs()
    total, worst = away.sum(), away.max()
    metrics.emit_max("model_output_max_abs_diff", worst)
    metrics.emit_max("model_output_rel_max", worst / (rollout.abs().max() + 1e-30))
    suffixes = ["", f"_{prepared.component_name}"] if len(ctx.models) > 1 else [""]
    for suffix in suffixes:
        name = f"model_output_mean_abs_diff{suffix}"
        metrics.emit_mean(name, total=total, count=away.numel())


def extra(prepared, name: str) -> Tensor:
    """One of those that a loss takes of MILES's `prepared`."""
    if name not in prepared.extras:
        raise ValueError(f"prepared.extras: expected {name}, got {', '.join(prepared.extras)}")
    return prepared.extras[name]


def of_rollout(batch: list[dict], name: str, like: Tensor) -> Tensor | None:
    """What the rollout has recorded for debugging, (B, ...) float32; None where a pair has none."""
    recorded = [(pair.get("rollout_debug_tensors") or {}).get(name) for pair in batch]
    if any(x is None for x in recorded):
        return None
    return torch.stack(recorded).to(like.device, torch.float32)
