"""The clipped policy loss of tokens, from hidden states and a language model's head on."""

from .api import TokenLoss, linear_log_prob, linear_policy_loss
from .weights import token_weights

__all__ = ["TokenLoss", "linear_log_prob", "linear_policy_loss", "token_weights"]
