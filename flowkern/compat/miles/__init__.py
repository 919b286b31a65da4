"""radixark/miles_diffusion (MILES): its SDE step backend and its two losses, by a flag each.

    --sde-step-backend-path flowkern.compat.miles.SdeStepBackend      (or CpsSdeStepBackend)
    --custom-loss-function-path flowkern.compat.miles.grpo_loss       (or nft_loss)

A loss gets the velocities, so that one `policy_loss` or `matching_loss` is the whole chain, where
the step backend is followed by the ratio, the clip and the KL. Both emit MILES's metrics.
"""

from flowkern.compat.miles.backend import (
    CpsSdeStepBackend,
    SdeStepBackend,
    SdeStepScore,
    sde_step_with_logprob,
)
from flowkern.compat.miles.grpo import grpo_loss
from flowkern.compat.miles.nft import nft_loss

__all__ = [
    "CpsSdeStepBackend",
    "SdeStepBackend",
    "SdeStepScore",
    "grpo_loss",
    "nft_loss",
    "sde_step_with_logprob",
]
