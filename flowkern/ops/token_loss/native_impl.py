"""The row kernel on the native CPU kernels (csrc/token_loss); triton_impl says what is what.

In 16 bits the logits of the tokens themselves, in float32, come from here: a gather and a dot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common import native_calls

from .inputs import Head, Objective, Statistics, Tokens


def policy_rows(
    logits: Tensor,
    head: Head,
    tokens: Tokens,
    objective: Objective,
    out: Statistics,
    with_gradient: bool,
) -> None:
    inputs = _inputs(logits, head, tokens.hidden, tokens.ids)
    native_calls.run("token_policy", *inputs, *tokens[2:], *objective, *out, with_gradient)


def log_prob_rows(
    logits: Tensor, head: Head, hidden: Tensor, ids: Tensor, out: tuple[Tensor, Tensor]
) -> None:
    log_prob, normalizer = out
    native_calls.run("token_log_prob", *_inputs(logits, head, hidden, ids), log_prob, *normalizer)


def gradient_rows(
    logits: Tensor, head: Head, hidden: Tensor, ids: Tensor, given: tuple[Tensor, Tensor]
) -> None:
    normalizer, grad = given
    native_calls.run("token_gradient", *_inputs(logits, head, hidden, ids), *normalizer, grad)


def _inputs(logits: Tensor, head: Head, hidden: Tensor, ids: Tensor) -> tuple:
    exact = None
    if logits.dtype != torch.float32:
        exact = (hidden.float() * head.weight[ids].float()).sum(1)
        if head.bias is not None:
            exact += head.bias[ids].float()
    return logits, ids, exact, head.temperature, head.softcap or 0.0
