"""Clipped policy loss of tokens, from hidden states and a language model's head on.

    z      = softcap tanh((h W^T + b) / softcap) / temperature
    lp     = z[id] - logsumexp(z),  r = exp(lp - old_log_prob)
    policy = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); at most -A dual_clip where A < 0
    kl     = exp(ref - lp) - (ref - lp) - 1,  tis = min(exp(old - sample), is_cap), detached
    loss   = sum over tokens of token_weight (tis policy + kl_coef kl - entropy_coef entropy)

M = tokens, H = hidden size, V = vocabulary. The (M, V) logits never exist together: chunks of
tokens go through one GEMM, one row kernel and two GEMMs (chunks.py).
Source: PPO (arXiv 1707.06347) as GRPO, DAPO and AgentFlow (arXiv 2510.05592) use it; dual clip:
arXiv 1912.09729.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flowkern.ops._common.arguments import check_per_sample
from flowkern.ops._common.dispatch import is_transformed

from . import reference
from .checks import check_head, check_objective, check_tokens
from .gradients import differentiable_log_prob, differentiable_loss
from .inputs import Head, Tokens
from .kernels import best


class TokenLoss(NamedTuple):
    """loss: (), differentiable in hidden, weight and bias. The rest is (M,), detached: float32, and
    clipped bool; of tokens of no weight it is 0.
    """

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    kl: Tensor
    entropy: Tensor
    clipped: Tensor


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    budget_bytes: int = 2**28,
    backend: str | None = None,
) -> Tensor:
    """(M,) float32 log-probabilities of `ids`, differentiable in hidden, weight and bias.

    Any loss of them may follow, of sequences too (GSPO); the backward pass makes the logits again.

    Args:
        hidden: (M, H), weight: (V, H), bias: (V,): float32, bfloat16 or float16, all of one dtype
            (float64: computed in float64). ids: (M,) integers.
        temperature, softcap: of the logits; see the module.
        budget_bytes: for the logits that exist at a time, of which there are those of 256 tokens
            at least. The reference makes them all.
        backend: "native" | "triton" | "reference"; None takes the best that can serve.

    Raises ValueError, TypeError, IndexError naming the argument; BackendError where the backend
    cannot serve.
    """
    head = Head(weight, bias, temperature, softcap, budget_bytes)
    head, dtype = check_head(hidden, head)
    tokens = Tokens(hidden, ids, None, None, None, None, None)
    hidden, ids, *_ = check_tokens(tokens, head, dtype)
    kernel = best(hidden.device, dtype, backend, is_transformed())
    if kernel == "reference":
        return reference.log_prob(hidden, head, ids, dtype)
    return differentiable_log_prob(kernel, hidden, head, ids)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_log_prob: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    sample_log_prob: Tensor | None = None,
    is_cap: float | None = None,
    budget_bytes: int = 2**28,
    backend: str | None = None,
) -> TokenLoss:
    """Clipped policy loss with its statistics; see the module for the formulas.

    Args: as in `linear_log_prob`, and
        old_log_prob: (M,), of the policy that the ratio is to, as linear_log_prob gives them; None:
            on policy, the ratio is exactly 1 and its gradient kept.
        advantage, token_weight: (M,); `token_weights` makes the latter. Tokens of weight 0 cost no
            GEMM, and their ids are not looked at.
        ref_log_prob: (M,), with kl_coef. entropy_coef: of the entropy, which is subtracted.
        clip_low, clip_high: the clip range; 1 is no lower bound. Beyond exp(20) the ratio is
            constant.
        dual_clip: the largest ratio where the advantage is negative.
        sample_log_prob: (M,), of the policy that has sampled, with is_cap (math.inf: none).

    Raises as `linear_log_prob` does.
    """
    head, dtype = check_head(hidden, Head(weight, bias, temperature, softcap, budget_bytes))
    settings = {
        "kl_coef": kl_coef, "entropy_coef": entropy_coef, "clip_low": clip_low,
        "clip_high": clip_high, "dual_clip": dual_clip, "is_cap": is_cap,
    }  # fmt: skip
    given = (old_log_prob, advantage, token_weight, ref_log_prob, sample_log_prob)
    for name, x in (("advantage", advantage), ("token_weight", token_weight)):
        check_per_sample(name, x, len(hidden), hidden.device)
    tokens = Tokens(hidden, ids, *given)
    objective = check_objective(settings, tokens)
    tokens = check_tokens(tokens, head, dtype)
    kernel = best(hidden.device, dtype, backend, is_transformed())
    if kernel == "reference":
        loss, made = reference.policy_loss(tokens, head, objective, dtype)
    else:
        loss, made = differentiable_loss(kernel, tokens, head, objective)
    return TokenLoss(loss, made.log_prob, made.ratio, made.kl, made.entropy, made.clipped)
