"""AgentFlow as its released code optimizes it (github.com/lupantech/AgentFlow at b9400643, on verl
0.5.0), which is not what the paper says; each deviation stands where it is set.

Not reproduced: token means are of an optimizer step, and not of each micro-batch of four rows per
process, whose weights would follow from how rows happen to lie; advantages are not rounded to
bfloat16; memories of earlier questions are not shown; nothing is dropped to round up batches; and
frequency_penalty 1.2, which the released client sends, is not sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowkern.rl.algorithms.agentflow import AgentFlow
from flowkern.rl.turns import Aggregation, GroupBy


@dataclass(frozen=True, kw_only=True)
class AgentFlowVerl(AgentFlow):
    """The released defaults."""

    group_by: GroupBy = "row"
    """A trajectory of three turns counts three times in the mean and std of its question: verl's
    estimator pools all rows of one uid, which is the question's."""
    unbiased_std: bool = True
    """verl: torch.std, divided by N - 1."""
    eps: float = 1e-6
    """verl's epsilon."""
    agg: Aggregation = "token_mean"
    """verl's loss_agg_mode: long turns and long trajectories weigh more."""
    clip_high: float = 0.3
    """Released as clip_ratio_high, with clip_ratio_low 0.2."""
    dual_clip: float | None = 3.0
    """verl's clip_ratio_c."""
    temperature: float = 0.7
    """What the client sends: the configured one is swallowed on its way."""
    top_p: float = 0.99
    """What the client sends."""
    is_cap: float | None = None
    """The trainer computes old log-probabilities again, and nothing corrects for the sampler's."""
    train_temperature: float | None = 1.0
    """verl's default: old and new log-probabilities are those of temperature 1."""
