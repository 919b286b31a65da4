"""Gradients of kernels in eager mode, without the dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class EagerGradient(torch.autograd.Function):
    """Gives a kernel's output its gradient in `velocity`, for less than the dispatcher's price.

    All but the velocity comes in tuples, and one output goes out: each argument and each output of
    a Function costs, and so does a setup_context.
    """

    @staticmethod
    def forward(
        ctx, velocity: Tensor, saved: tuple, rest: tuple[Tensor, Callable, tuple]
    ) -> Tensor:
        """rest: the output, backward(grad, *saved, *settings), and its settings."""
        ctx.save_for_backward(*saved)
        output, ctx.backward_pass, ctx.settings = rest
        return output

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # with create_graph the result would pass for a constant
            raise RuntimeError(
                "the kernels have no second derivative; with create_graph=True use "
                "backend='reference'"
            )
        return ctx.backward_pass(grad, *ctx.saved_tensors, *ctx.settings), None, None
