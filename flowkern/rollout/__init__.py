"""Rollouts: what is sampled (plan) and how it is run (engine)."""

from flowkern.rollout.engine import Batch, Rollout, Roots, run, sample_ids
from flowkern.rollout.plan import Chain

__all__ = ["Batch", "Chain", "Rollout", "Roots", "run", "sample_ids"]
