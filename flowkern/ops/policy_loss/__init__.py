"""The clipped policy loss over steps of a flow: from velocity to loss."""

from .api import PolicyLoss, policy_loss

__all__ = ["PolicyLoss", "policy_loss"]
