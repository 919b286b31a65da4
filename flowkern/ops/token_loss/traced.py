"""The token losses as ops: what compilers and dispatch modes see in place of the loop over chunks.

What is wanted are gradients of hidden, weight and bias; an op gives an empty one for each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops._common.arguments import check_index

from .chunks import Wanted, log_prob_gradients, log_prob_pass, policy_pass
from .inputs import Head, Objective, Statistics, Tokens
from .kernels import row_kernel

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids"
_TOKENS = "Tensor? old, Tensor advantage, Tensor token_weight, Tensor? ref, Tensor? sample"
_SETTINGS = "float temperature, float? softcap, int budget, bool[] wanted, str kernel"
_GRADIENTS = "Tensor, Tensor, Tensor"


def traced_loss(
    kernel: str, tokens: Tokens, head: Head, objective: Objective, wanted: Wanted
) -> tuple[Tensor, Statistics]:
    loss, *made = _policy(
        tokens.hidden,
        head.weight,
        head.bias,
        *tokens[1:],
        [*objective],
        *_settings(kernel, head, wanted),
    )[:6]
    return loss, Statistics(*made[:4], loss, made[4])


def traced_log_prob(kernel: str, hidden: Tensor, head: Head, ids: Tensor, wanted: Wanted) -> Tensor:
    inputs = hidden, head.weight, head.bias, ids
    return _log_prob(*inputs, *_settings(kernel, head, wanted))[0]


def _settings(kernel: str, head: Head, wanted: Wanted) -> tuple:
    return head.temperature, head.softcap, head.budget_bytes, [*wanted], kernel


def _whole(gradients: tuple, like: Tensor, unit: Tensor | None = None) -> tuple[Tensor, ...]:
    """An op gives tensors, of known dtypes: of the head in float32, of float16 all."""
    hidden, *of_head = (like.new_empty(0) if g is None else g for g in gradients)
    all_of = [hidden.float() if hidden.dtype == torch.float16 else hidden]
    all_of += [g.float() for g in of_head]
    return tuple(all_of) if unit is None else tuple(g * unit for g in all_of)


def _fakes(hidden: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    def fake(x: Tensor, is_wanted: bool, dtype: torch.dtype) -> Tensor:
        return x.new_empty(x.shape if is_wanted else (0,), dtype=dtype)

    is_narrow = wanted[0] and hidden.dtype == torch.bfloat16
    of_hidden = fake(hidden, wanted[0], hidden.dtype if is_narrow else torch.float32)
    of_head = zip((weight, weight[:, 0]), wanted[1:], strict=True)
    return of_hidden, *(fake(x, is_wanted, torch.float32) for x, is_wanted in of_head)


def _given(gradients: list[Tensor], inputs: tuple, wanted: list[bool]) -> list[Tensor | None]:
    """Gradients in the dtypes of their inputs; None for what is not wanted."""
    three = zip(gradients, inputs, wanted, strict=True)
    return [g.to(x.dtype) if is_wanted else None for g, x, is_wanted in three]


def _floats(ids: Tensor, *shape: int) -> Tensor:
    return ids.new_empty((*shape, *ids.shape), dtype=torch.float32)


def _policy_pass(hidden, weight, bias, ids, *rest):
    *of_tokens, numbers, temperature, softcap, budget, wanted, kernel = rest
    check_index("ids", ids, len(weight), ids.device)  # while traced they had no values
    head, objective = Head(weight, bias, temperature, softcap, budget), Objective(*numbers)
    tokens = Tokens(hidden, ids, *of_tokens)
    made, gradients, unit = policy_pass(
        row_kernel(kernel), tokens, head, objective, Wanted(*wanted)
    )
    loss = made.loss.sum(dtype=torch.float64).float()
    statistics = [x.clone() for x in (*made[:4], made.clipped)]  # outputs share no memory
    return loss, *statistics, *_whole(gradients, loss, unit)


_policy = torch.library.custom_op(
    "flowkern::linear_policy_loss",
    _policy_pass,
    mutates_args=(),
    schema=f"({_HEAD}, {_TOKENS}, float[] numbers, {_SETTINGS}) -> "
    f"(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, {_GRADIENTS})",
)


@_policy.register_fake
def _(hidden, weight, bias, ids, *rest):
    statistics = [_floats(ids) for _ in range(4)]
    clipped = ids.new_empty(ids.shape, dtype=torch.bool)
    loss = ids.new_empty((), dtype=torch.float32)
    return loss, *statistics, clipped, *_fakes(hidden, weight, rest[-2])


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.wanted, ctx.inputs = inputs[-2], len(inputs)
    ctx.dtypes = [None if x is None else x.new_empty(0) for x in inputs[:3]]
    ctx.save_for_backward(*output[6:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad, *_) -> tuple:
    scaled = [g * grad.reshape(1) for g in ctx.saved_tensors]
    return *_given(scaled, ctx.dtypes, ctx.wanted), *[None] * (ctx.inputs - 3)


_policy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _log_prob_pass(hidden, weight, bias, ids, *settings):
    *of_head, _, kernel = settings
    check_index("ids", ids, len(weight), ids.device)
    head = Head(weight, bias, *of_head)
    return log_prob_pass(row_kernel(kernel), hidden, head, ids)


_log_prob = torch.library.custom_op(
    "flowkern::linear_log_prob",
    _log_prob_pass,
    mutates_args=(),
    schema=f"({_HEAD}, {_SETTINGS}) -> (Tensor, Tensor)",
)


@_log_prob.register_fake
def _(hidden, weight, bias, ids, *rest):
    return _floats(ids), _floats(ids, 2)


def _log_prob_gradients(grad, normalizer, hidden, weight, bias, ids, *settings):
    temperature, softcap, budget, wanted, kernel = settings
    head = Head(weight, bias, temperature, softcap, budget)
    given = hidden, head, ids, normalizer, grad.contiguous(), Wanted(*wanted)
    return _whole(log_prob_gradients(row_kernel(kernel), *given), grad)


_log_prob_backward = torch.library.custom_op(
    "flowkern::linear_log_prob_backward",
    _log_prob_gradients,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor normalizer, {_HEAD}, {_SETTINGS}) -> ({_GRADIENTS})",
)


@_log_prob_backward.register_fake
def _(grad, normalizer, hidden, weight, bias, ids, *rest):
    return _fakes(hidden, weight, rest[-2])


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], *inputs[:4])
    ctx.settings = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _) -> tuple:
    gradients = _log_prob_backward(grad, *ctx.saved_tensors, *ctx.settings)
    given = _given(gradients, ctx.saved_tensors[1:4], ctx.settings[-2])
    return *given, *[None] * (1 + len(ctx.settings))


_log_prob.register_autograd(_backward, setup_context=_keep_inputs)
