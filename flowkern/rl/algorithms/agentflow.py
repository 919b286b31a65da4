"""AgentFlow's Flow-GRPO, of token models (arXiv 2510.05592), which is not the Flow-GRPO of images.

All turns of a trajectory learn from the reward of its answer. Loss, equations 5 to 7: the mean over
trajectories of the mean over their turns of the mean over their tokens of the clipped ratio, with a
KL to the planner that training began with.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowkern.rl.turns import TurnRecipe


@dataclass(frozen=True, kw_only=True)
class AgentFlow(TurnRecipe):
    """The paper's defaults, section 4, where they are not those that `TurnRecipe` has: turn means,
    groups of trajectories, all turns, no correction of the std.

    The paper leaves open the clip range (here PPO's), the estimator of the KL (k3) and whether the
    std is of N or N - 1 (N, without an epsilon).
    """

    group_size: int = 8
    """Trajectories per question."""
    prompts_per_rollout: int = 32
    """Questions of a rollout, over all processes."""
    temperature: float = 0.5
    kl_coef: float = 0.001
