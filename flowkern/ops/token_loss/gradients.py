"""The token losses for autograd: the policy loss makes its gradients in the forward pass, where the
logits are; linear_log_prob makes the logits again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowkern import torch_private as private
from flowkern.ops._common.autograd import check_derivatives
from flowkern.ops._common.dispatch import is_tracing, is_transformed

from . import chunks
from .chunks import Made, Wanted
from .inputs import Head, Objective, Statistics, Tokens
from .kernels import row_kernel
from .traced import traced_log_prob, traced_loss


def _wanted(*inputs: Tensor | None) -> Wanted:
    on = torch.is_grad_enabled()
    return Wanted(*(on and x is not None and x.requires_grad for x in inputs))


def _detached(*inputs: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach() for x in inputs]


def differentiable_loss(
    kernel: str, tokens: Tokens, head: Head, objective: Objective
) -> tuple[Tensor, Statistics]:
    """The loss, and its statistics."""
    inputs = tokens.hidden, head.weight, head.bias
    wanted = _wanted(*inputs)
    if is_tracing(*inputs):
        return traced_loss(kernel, tokens, head, objective, wanted)
    hidden, weight, bias = _detached(*inputs)
    tokens, head = tokens._replace(hidden=hidden), head._replace(weight=weight, bias=bias)

    def run() -> Made:
        return chunks.policy_pass(row_kernel(kernel), tokens, head, objective, wanted)

    versions = _versions(tokens)

    def again() -> Made:
        if _versions(tokens) != versions:
            raise RuntimeError(
                "a tensor that linear_policy_loss was given has been modified in place, so a "
                "second backward pass cannot make its gradients again"
            )
        return run()

    made = run()
    loss = made.statistics.loss.sum(dtype=torch.float64).float()
    if any(wanted):
        loss = _Kept.apply(*inputs, (loss, made, again, kernel))
    return loss, made.statistics


def _versions(tokens: Tokens) -> list[int]:
    """How often each has been written to; what is of inference mode does not say."""
    return [x._version for x in tokens if x is not None and not x.is_inference()]


class _Kept(torch.autograd.Function):
    """Gives the loss gradients that were made with it. The first backward pass takes them, in their
    memory; another (retain_graph) makes them again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rest: tuple[Tensor, Made, Callable, str]) -> Tensor:
        loss, ctx.made, ctx.again, ctx.backend = rest
        ctx.save_for_backward(hidden, weight, bias)
        return loss

    @staticmethod
    def backward(ctx, grad):
        _check(ctx.backend, grad)
        inputs = ctx.saved_tensors  # raises where one has changed
        made, ctx.made = ctx.made, None
        made = made or ctx.again()
        if made.unit is not None:
            grad = grad * made.unit
        return *map(_scaled, made.gradients, [grad] * 3, inputs), None


def _scaled(gradient: Tensor | None, grad: Tensor, of: Tensor | None) -> Tensor | None:
    """grad times a gradient that nobody else has, in the dtype of its input."""
    if gradient is None:
        return None
    is_same = gradient.dtype == of.dtype
    if is_same and grad.is_cpu and grad == 1:  # most losses are the last step of their graph
        return gradient
    out = gradient if is_same else torch.empty(of.shape, dtype=of.dtype, device=of.device)
    if grad.is_cuda and gradient.numel():
        # torch has no vectors for a product of two dtypes: 2.4 ms where the bytes take 0.8.
        row_kernel("triton").scaled(gradient, grad, out)
        return out
    grad = grad.reshape(1)  # a scalar would be rounded to 16 bits
    if grad.is_cpu and not is_same:  # else a product in float32 is kept whole on its way
        return out.copy_(gradient.mul_(grad))
    return torch.mul(gradient, grad, out=out)


def differentiable_log_prob(kernel: str, hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    wanted = _wanted(hidden, head.weight, head.bias)
    if is_tracing(hidden, head.weight, head.bias):
        return traced_log_prob(kernel, hidden, head, ids, wanted)
    if any(wanted):
        return _LogProb.apply(hidden, head.weight, head.bias, (head, ids, kernel))
    inputs = _detached(hidden, head.weight, head.bias)
    head = head._replace(weight=inputs[1], bias=inputs[2])
    return chunks.log_prob_pass(row_kernel(kernel), inputs[0], head, ids)[0]


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rest: tuple[Head, Tensor, str]) -> Tensor:
        head, ids, ctx.kernel = rest
        ctx.head = head._replace(weight=None, bias=None)
        head = ctx.head._replace(weight=weight, bias=bias)
        log_prob, normalizer = chunks.log_prob_pass(row_kernel(ctx.kernel), hidden, head, ids)
        ctx.save_for_backward(hidden, weight, bias, ids, normalizer)
        return log_prob

    @staticmethod
    def backward(ctx, grad):
        _check(ctx.kernel, grad)
        hidden, weight, bias, ids, normalizer = ctx.saved_tensors
        head = ctx.head._replace(weight=weight, bias=bias)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        gradients = chunks.log_prob_gradients(
            row_kernel(ctx.kernel), hidden, head, ids, normalizer, grad.contiguous(), wanted
        )
        inputs = hidden, weight, bias
        return *(
            g if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)
        ), None


def _check(backend: str, grad: Tensor) -> None:
    if is_transformed() or private.is_batched(grad) or torch.is_grad_enabled():
        check_derivatives(backend)
