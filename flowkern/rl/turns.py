"""Recipes of token models that act in turns: what trains a planner, apart from its numbers.

A trajectory is several turns of a planner, each with a prompt of its own, and one reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from flowkern.checks import ABOVE_0, AT_LEAST_0, SHARE, Range
from flowkern.rl.recipe import AnyRecipe

Aggregation = Literal["turn_mean", "seq_mean", "token_mean", "constant"]
GroupBy = Literal["trajectory", "row"]


@dataclass(frozen=True, kw_only=True)
class TurnRecipe(AnyRecipe):
    """The clipped ratio of each token, weighted, and what a turn gets of its trajectory's
    reward."""

    task = "planner"

    temperature: Annotated[float, ABOVE_0] = 1.0
    """Of sampling, and so of the policy that is trained."""
    top_p: Annotated[float, SHARE] = 1.0
    """The likeliest tokens that make up this share are sampled from; 1: all."""
    clip_low: Annotated[float, Range(0, 1, above=True)] = 0.2
    """The ratio is clipped at 1 less this."""
    clip_high: Annotated[float, ABOVE_0] = 0.2
    """The ratio is clipped at 1 and this."""
    dual_clip: Annotated[float | None, Range(1, above=True)] = None
    """The largest ratio where the advantage is negative; None: none."""
    kl_coef: Annotated[float, AT_LEAST_0] = 0.0
    """Of the KL (k3) to the planner that training began with."""
    entropy_coef: Annotated[float, AT_LEAST_0] = 0.0
    """Of an entropy bonus."""
    agg: Aggregation = "turn_mean"
    """What a token weighs, as `token_weights` takes it; counts are those of an optimizer step over
    all processes. "constant": 1 / the tokens that its turns could have had."""
    group_by: GroupBy = "trajectory"
    """What mean and std of a question's rewards are over: trajectories, or their turns."""
    turns: Literal["all", "final"] = "all"
    """Which of a trajectory's turns learn."""
    unbiased_std: bool = False
    """Divide by N - 1 in the variance."""
    eps: Annotated[float, AT_LEAST_0] = 0.0
    """Added to the std."""
    skip_flat: bool = False
    """Leave out groups that teach nothing, whose KL and entropy would still count."""
    is_cap: Annotated[float | None, ABOVE_0] = 2.0
    """Where the sampler's probabilities are not the trainer's own, a token's loss is scaled by
    min(theirs in the trainer / in the sampler, this); None: never."""
    train_temperature: Annotated[float | None, ABOVE_0] = None
    """Of the policy that is trained; None: that of sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None and self.dual_clip < 1 + self.clip_high:
            raise ValueError(
                f"dual_clip: got {self.dual_clip}, expected at least 1 + clip_high, "
                f"{1 + self.clip_high}"
            )
