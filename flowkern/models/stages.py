"""Two networks that share the noise levels, as one that a trainer wraps, trains and saves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Stages"]


class Stages(nn.Module):
    """Two networks as one: `transformer` for rows of much noise, `transformer_2` for the others."""

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.asks_both = False
        """Is one that no row is for asked, too? Where processes each have a part of the weights,
        all of them gather those of both, in one order."""

    def enable_gradient_checkpointing(self) -> None:
        for network in (self.transformer, self.transformer_2):
            network.enable_gradient_checkpointing()

    def forward(
        self, is_low: Sequence[bool], return_dict: bool = False, **inputs: Tensor
    ) -> tuple[Tensor]:
        """inputs: of either network, B rows each; is_low: which one a row is for. -> (B, *D)."""
        first = len(is_low) - sum(is_low)
        if first in (0, len(is_low)) and self.asks_both:
            return (self._both(not first, inputs),)
        if first in (0, len(is_low)):
            asked, idle = self.transformer, self.transformer_2
            if not first:
                asked, idle = idle, asked
            found = asked(**inputs, return_dict=False)[0]
            return (found + _nothing(idle) if torch.is_grad_enabled() else found,)
        order = torch.tensor(sorted(range(len(is_low)), key=is_low.__getitem__))
        order = order.to(inputs["hidden_states"].device, non_blocking=True)
        high = {name: value[order[:first]] for name, value in inputs.items()}
        low = {name: value[order[first:]] for name, value in inputs.items()}
        found = [
            self.transformer(**high, return_dict=False)[0],
            self.transformer_2(**low, return_dict=False)[0],
        ]
        return (torch.cat(found)[order.argsort()],)

    def _both(self, is_low: bool, inputs: dict[str, Tensor]) -> Tensor:
        """All rows of one network, after or before the first row of the other, of which 0 is taken:
        its gradients are zeros."""
        row = {name: value[:1] for name, value in inputs.items()}
        asked = [row, inputs] if is_low else [inputs, row]
        networks = self.transformer, self.transformer_2
        found = [
            network(**rows, return_dict=False)[0]
            for network, rows in zip(networks, asked, strict=True)
        ]
        out, other = found[is_low], found[not is_low]
        return out + 0 * other if torch.is_grad_enabled() else out


def _nothing(network: nn.Module) -> Tensor | int:
    """0, of which every trained weight is a part: processes that average gradients wait for all."""
    return sum(0 * p.flatten()[0] for p in network.parameters() if p.requires_grad)
