"""The token losses in plain torch: the truth, differentiated by autograd; all logits at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkern.ops._common.loss_reference import clipped_policy

from .inputs import LARGEST_LOG_RATIO, Head, Objective, Statistics, Tokens


def distribution(hidden: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """(M, V) log-probabilities."""
    with torch.autocast(hidden.device.type, enabled=False):  # which would make 16 bits of it
        logits = hidden.to(dtype) @ head.weight.to(dtype).t()
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / head.temperature, dim=-1)


def log_prob(hidden: Tensor, head: Head, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,)"""
    return distribution(hidden, head, dtype).gather(1, ids[:, None])[:, 0]


def policy_loss(
    tokens: Tokens, head: Head, objective: Objective, dtype: torch.dtype
) -> tuple[Tensor, Statistics]:
    """The loss, differentiable in hidden, weight and bias, and what it is made of."""
    count, (tokens, index) = len(tokens.ids), tokens.weighted()
    all_log_probs = distribution(tokens.hidden, head, dtype)
    log_prob = all_log_probs.gather(1, tokens.ids[:, None])[:, 0]
    # A logit of -inf has no probability, and adds nothing.
    finite = torch.where(all_log_probs > -torch.inf, all_log_probs, 0)
    entropy = -(all_log_probs.exp() * finite).sum(1)
    old = log_prob.detach() if tokens.old_log_prob is None else tokens.old_log_prob
    log_ratio = (log_prob - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    loss, clipped = _policy(tokens.advantage, log_ratio, objective)
    if tokens.sample_log_prob is not None:
        loss = loss * (old - tokens.sample_log_prob).exp().clamp(max=objective.is_cap)
    kl = torch.zeros_like(entropy)
    if tokens.ref_log_prob is not None:
        drift = tokens.ref_log_prob - log_prob
        kl = torch.expm1(drift) - drift
        loss = loss + objective.kl_coef * kl
    loss = tokens.token_weight * (loss - objective.entropy_coef * entropy)
    made = (log_prob, log_ratio.exp(), kl, entropy, loss, clipped)
    return loss.sum(), Statistics(*(x.detach() for x in made)).spread(index, count)


def _policy(advantage: Tensor, log_ratio: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The clipped term, and where it is clipped."""
    bounds = objective.log_low, objective.log_high
    loss, clipped_low, clipped_high = clipped_policy(advantage, log_ratio, bounds)
    capped = (advantage < 0) & (log_ratio > objective.log_dual)
    if objective.log_dual < torch.inf:
        loss = torch.where(capped, -advantage * math.exp(objective.log_dual), loss)
    return loss, clipped_low | clipped_high | capped
