"""flowkern: fused kernels and a thin trainer for reinforcement learning of flow-matching models."""

from typing import TYPE_CHECKING

from flowkern.lookup import lazily

if TYPE_CHECKING:
    from flowkern import schedules
    from flowkern.ops._common.dispatch import BackendError, backends
    from flowkern.ops._common.philox import philox_normal
    from flowkern.ops.matching_loss import MatchingLoss, add_noise, matching_loss
    from flowkern.ops.policy_loss import PolicyLoss, policy_loss
    from flowkern.ops.sde_step import ode_step, sde_log_prob, sde_step

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "MatchingLoss",
    "PolicyLoss",
    "add_noise",
    "backends",
    "matching_loss",
    "ode_step",
    "philox_normal",
    "policy_loss",
    "schedules",
    "sde_log_prob",
    "sde_step",
]

_HOMES = {
    "BackendError": "flowkern.ops._common.dispatch",
    "MatchingLoss": "flowkern.ops.matching_loss",
    "PolicyLoss": "flowkern.ops.policy_loss",
    "add_noise": "flowkern.ops.matching_loss",
    "backends": "flowkern.ops._common.dispatch",
    "matching_loss": "flowkern.ops.matching_loss",
    "ode_step": "flowkern.ops.sde_step",
    "philox_normal": "flowkern.ops._common.philox",
    "policy_loss": "flowkern.ops.policy_loss",
    "schedules": "flowkern.schedules",
    "sde_log_prob": "flowkern.ops.sde_step",
    "sde_step": "flowkern.ops.sde_step",
}
__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
