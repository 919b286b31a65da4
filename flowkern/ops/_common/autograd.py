"""Gradients of kernels in eager mode, without the dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class EagerLoss(torch.autograd.Function):
    """Gives the loss of an op's `output` its gradient, for less than the dispatcher's price.

    All but the velocity comes in tuples, and only the loss goes out: each argument and each output
    of a Function costs, and so does a setup_context.
    """

    @staticmethod
    def forward(
        ctx, velocity: Tensor, others: tuple, output: tuple, passes: tuple[Callable, Callable]
    ) -> Tensor:
        """passes: (save(ctx, inputs, output), backward(grad, *saved, *settings)) of the op."""
        save, ctx.backward_pass = passes
        save(ctx, (velocity, *others), output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        gradient = ctx.backward_pass(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return gradient, None, None, None


def refuse_second_derivative() -> None:
    """For the backward pass of a kernel: with create_graph its result would pass for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the kernels have no second derivative; with create_graph=True use backend='reference'"
        )
