"""A planner's network as the loss asks it: hidden states of turns, and the head behind them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from flowkern.agent.batch import Padded
from flowkern.ops.token_loss import TokenLoss, linear_log_prob, linear_policy_loss


class Policy(nn.Module):
    """A causal language model of transformers, adapted by peft or not.

    Only the positions of turns go through the head, and never as logits: a prompt is most of a
    row, and V logits of each of its tokens would be most of the memory.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError for a model whose logits are more than its head's."""
        super().__init__()
        self.model = model
        config = self.causal.config
        for name in ("logits_scaling", "logit_scale"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"its configuration has {name}, which is not built here")
        self.softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def causal(self) -> nn.Module:
        """The language model itself, adapted in place."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def disable_adapter(self) -> AbstractContextManager:
        """Around what the model says without what it learned; of an adapted one."""
        return self.model.disable_adapter()

    def forward(self, rows: Padded, options: dict[str, Any]) -> Tensor | TokenLoss:
        """`linear_policy_loss` of the rows' tokens with these options, or, without any but the
        temperature, their log-probabilities (m,)."""
        hidden = self.causal.base_model(input_ids=rows.input_ids, use_cache=False)
        hidden = hidden.last_hidden_state[rows.row, rows.place]
        weight, bias = self.head()
        head = weight.to(hidden.dtype), rows.target
        shared = {"softcap": self.softcap, "bias": None if bias is None else bias.to(hidden.dtype)}
        if options.keys() <= {"temperature"}:
            return linear_log_prob(hidden, *head, **shared, **options)
        return linear_policy_loss(hidden, *head, **shared, **options)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, H) and bias (V,) of the head, with what an adapter adds to it."""
        head = self.causal.get_output_embeddings()
        if not hasattr(head, "base_layer"):
            return head.weight, head.bias if hasattr(head, "bias") else None
        base = head.get_base_layer()
        weight = base.weight
        if not head.disable_adapters:
            for name in head.active_adapters:
                if name in head.lora_A:
                    weight = weight + head.get_delta_weight(name).to(weight.dtype)
        return weight, base.bias

    @torch.no_grad()
    def log_prob(self, rows: Padded, temperature: float) -> Tensor:
        """(m,) float32, without a gradient."""
        return self(rows, {"temperature": temperature})
