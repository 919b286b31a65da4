"""What the token losses take, checked: M tokens, hidden size H, vocabulary V."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """What makes logits of hidden states: softcap tanh((h W^T + b) / softcap) / temperature."""

    weight: Tensor  # (V, H), the last dimension contiguous
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None
    budget_bytes: int  # for the logits that exist at a time


class Tokens(NamedTuple):
    """What belongs to each token."""

    hidden: Tensor  # (M, H), in the dtype of the weight, the last dimension contiguous
    ids: Tensor  # (M,) int64
    old_log_prob: Tensor | None  # (M,), in the dtype of the arithmetic, as all that follow
    advantage: Tensor
    token_weight: Tensor
    ref_log_prob: Tensor | None
    sample_log_prob: Tensor | None

    def at(self, index: slice | Tensor) -> Tokens:
        return Tokens(*(None if x is None else x[index] for x in self))

    def weighted(self) -> tuple[Tokens, Tensor | None]:
        """The tokens that weigh something, and where they are; None where all do."""
        (index,) = self.token_weight.ne(0).nonzero(as_tuple=True)
        return (self, None) if len(index) == len(self.ids) else (self.at(index), index)


class Objective(NamedTuple):
    """The numbers of the loss. Bounds are of the log-ratio, infinite where there is none."""

    kl_coef: float
    entropy_coef: float
    log_low: float
    log_high: float
    log_dual: float  # of the ratio where the advantage is negative
    is_cap: float

    @property
    def needs_all(self) -> bool:
        """Whether tokens without an advantage have a gradient, too."""
        return self.kl_coef != 0 or self.entropy_coef != 0


class Statistics(NamedTuple):
    """Of each token: (M,), detached; loss is what it adds to the loss."""

    log_prob: Tensor
    ratio: Tensor
    kl: Tensor
    entropy: Tensor
    loss: Tensor
    clipped: Tensor  # bool

    @classmethod
    def empty(cls, count: int, device: torch.device) -> Statistics:
        floats = torch.empty(5, count, dtype=torch.float32, device=device)
        return cls(*floats, torch.empty(count, dtype=torch.bool, device=device))

    def at(self, index: slice) -> Statistics:
        return Statistics(*(x[index] for x in self))

    def spread(self, index: Tensor | None, count: int) -> Statistics:
        """Those of tokens at `index` among `count`, of which the others have 0."""
        return self if index is None else Statistics(*(spread(x, index, count) for x in self))


def spread(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Rows at `index` among `count`, of which the others are 0."""
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, index, rows)


LARGEST_LOG_RATIO = 20.0  # of either sign; beyond it the ratio is constant


def log_or_infinite(bound: float | None) -> float:
    return math.inf if bound is None else math.log(bound)
