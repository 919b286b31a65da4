"""What is learned from samples: advantages, objectives, and one recipe per algorithm."""

from typing import TYPE_CHECKING

from flowkern.lookup import lazily

if TYPE_CHECKING:
    from flowkern.rl.advantage import Credit
    from flowkern.rl.depth import DepthCredit, GainCredit
    from flowkern.rl.objectives import Matching, Objective, Outcome, RatioClip

__all__ = [
    "Credit",
    "DepthCredit",
    "GainCredit",
    "Matching",
    "Objective",
    "Outcome",
    "RatioClip",
]

_HOMES = {
    "Credit": "flowkern.rl.advantage",
    "DepthCredit": "flowkern.rl.depth",
    "GainCredit": "flowkern.rl.depth",
    "Matching": "flowkern.rl.objectives",
    "Objective": "flowkern.rl.objectives",
    "Outcome": "flowkern.rl.objectives",
    "RatioClip": "flowkern.rl.objectives",
}
__getattr__ = lazily(__name__, _HOMES)
