"""flowkern: fused kernels and a thin trainer for reinforcement learning of flow-matching models."""

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
