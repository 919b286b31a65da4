"""Rollouts: what is sampled (plan, and its layout), how it is run (engine, by blocks), what is
left of it (states), and what of that is trained (batches).
"""

from typing import TYPE_CHECKING

from flowkern.lookup import lazily

if TYPE_CHECKING:
    from flowkern.rollout.batches import (
        PointBatch,
        StepBatch,
        batch,
        network_batches,
        sampled_velocity,
        takes_part,
    )
    from flowkern.rollout.blocks import Blocks
    from flowkern.rollout.deal import Deal
    from flowkern.rollout.engine import Guidance, Guide, run
    from flowkern.rollout.layout import Layout
    from flowkern.rollout.plan import Cost, Plan, require_one_form
    from flowkern.rollout.states import Rollout, Source, prompt_ids

__all__ = [
    "Blocks",
    "Cost",
    "Deal",
    "Guidance",
    "Guide",
    "Layout",
    "Plan",
    "PointBatch",
    "Rollout",
    "Source",
    "StepBatch",
    "batch",
    "network_batches",
    "prompt_ids",
    "require_one_form",
    "run",
    "sampled_velocity",
    "takes_part",
]

_HOMES = {
    "Blocks": "flowkern.rollout.blocks",
    "Cost": "flowkern.rollout.plan",
    "Deal": "flowkern.rollout.deal",
    "Guidance": "flowkern.rollout.engine",
    "Guide": "flowkern.rollout.engine",
    "Layout": "flowkern.rollout.layout",
    "Plan": "flowkern.rollout.plan",
    "PointBatch": "flowkern.rollout.batches",
    "Rollout": "flowkern.rollout.states",
    "Source": "flowkern.rollout.states",
    "StepBatch": "flowkern.rollout.batches",
    "batch": "flowkern.rollout.batches",
    "network_batches": "flowkern.rollout.batches",
    "sampled_velocity": "flowkern.rollout.batches",
    "takes_part": "flowkern.rollout.batches",
    "prompt_ids": "flowkern.rollout.states",
    "require_one_form": "flowkern.rollout.plan",
    "run": "flowkern.rollout.engine",
}
__getattr__ = lazily(__name__, _HOMES)
