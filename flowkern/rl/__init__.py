"""What is learned from samples: advantages, objectives, and one recipe per algorithm."""

from typing import TYPE_CHECKING

from flowkern.lookup import lazily

if TYPE_CHECKING:
    from flowkern.rl.advantage import Credit
    from flowkern.rl.depth import DepthCredit, GainCredit
    from flowkern.rl.distillation import Distillation, NoCredit
    from flowkern.rl.divergence import DivergenceMask
    from flowkern.rl.groups import CenteredReward, GroupPreference
    from flowkern.rl.kl_weight import RewardKL, UncertainKL
    from flowkern.rl.objectives import Matching, Objective, Outcome, RatioClip
    from flowkern.rl.win_rate import WinRate

__all__ = [
    "CenteredReward",
    "Credit",
    "DepthCredit",
    "Distillation",
    "DivergenceMask",
    "GainCredit",
    "GroupPreference",
    "Matching",
    "NoCredit",
    "Objective",
    "Outcome",
    "RatioClip",
    "RewardKL",
    "UncertainKL",
    "WinRate",
]

_HOMES = {
    "CenteredReward": "flowkern.rl.groups",
    "Credit": "flowkern.rl.advantage",
    "DepthCredit": "flowkern.rl.depth",
    "Distillation": "flowkern.rl.distillation",
    "DivergenceMask": "flowkern.rl.divergence",
    "GainCredit": "flowkern.rl.depth",
    "GroupPreference": "flowkern.rl.groups",
    "Matching": "flowkern.rl.objectives",
    "NoCredit": "flowkern.rl.distillation",
    "Objective": "flowkern.rl.objectives",
    "Outcome": "flowkern.rl.objectives",
    "RatioClip": "flowkern.rl.objectives",
    "RewardKL": "flowkern.rl.kl_weight",
    "UncertainKL": "flowkern.rl.kl_weight",
    "WinRate": "flowkern.rl.win_rate",
}
__getattr__ = lazily(__name__, _HOMES)
