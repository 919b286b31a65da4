"""flowkern: fused kernels and a thin trainer for reinforcement learning of flow-matching models."""

from typing import TYPE_CHECKING

from flowkern.lookup import lazily

if TYPE_CHECKING:
    from flowkern import schedules
    from flowkern.ops._common.dispatch import BackendError, backends
    from flowkern.ops._common.philox import philox_normal
    from flowkern.ops.guidance import rescaled_guidance
    from flowkern.ops.matching_loss import MatchingLoss, add_noise, matching_loss
    from flowkern.ops.policy_loss import PolicyLoss, policy_loss
    from flowkern.ops.sde_step import ode_step, sde_log_prob, sde_step
    from flowkern.ops.token_loss import (
        TokenLoss,
        linear_log_prob,
        linear_policy_loss,
        token_weights,
    )

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "MatchingLoss",
    "PolicyLoss",
    "TokenLoss",
    "add_noise",
    "backends",
    "linear_log_prob",
    "linear_policy_loss",
    "matching_loss",
    "ode_step",
    "philox_normal",
    "policy_loss",
    "rescaled_guidance",
    "schedules",
    "sde_log_prob",
    "sde_step",
    "token_weights",
]

_HOMES = {
    "BackendError": "flowkern.ops._common.dispatch",
    "MatchingLoss": "flowkern.ops.matching_loss",
    "PolicyLoss": "flowkern.ops.policy_loss",
    "TokenLoss": "flowkern.ops.token_loss",
    "add_noise": "flowkern.ops.matching_loss",
    "backends": "flowkern.ops._common.dispatch",
    "linear_log_prob": "flowkern.ops.token_loss",
    "linear_policy_loss": "flowkern.ops.token_loss",
    "matching_loss": "flowkern.ops.matching_loss",
    "ode_step": "flowkern.ops.sde_step",
    "philox_normal": "flowkern.ops._common.philox",
    "policy_loss": "flowkern.ops.policy_loss",
    "rescaled_guidance": "flowkern.ops.guidance",
    "schedules": "flowkern.schedules",
    "sde_log_prob": "flowkern.ops.sde_step",
    "sde_step": "flowkern.ops.sde_step",
    "token_weights": "flowkern.ops.token_loss",
}
__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
