"""Rollouts: what is sampled (plan), how it is run (engine), what of it is trained (batches)."""

from flowkern.rollout.batches import PointBatch, StepBatch, batch, network_rows
from flowkern.rollout.engine import Guidance, Rollout, Source, prompt_ids, run
from flowkern.rollout.plan import Cost, Plan

__all__ = [
    "Cost",
    "Guidance",
    "Plan",
    "PointBatch",
    "Rollout",
    "Source",
    "StepBatch",
    "batch",
    "network_rows",
    "prompt_ids",
    "run",
]
