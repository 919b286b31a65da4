"""Gradients of kernels in eager mode, without the dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import BackendError, is_in_func


class EagerGradient(torch.autograd.Function):
    """Gives a kernel's output its gradient in `velocity`, for less than the dispatcher's price.

    All but the velocity comes in tuples, and one output goes out: each argument and each output of
    a Function costs, and so does a setup_context.
    """

    @staticmethod
    def forward(
        ctx, velocity: Tensor, saved: tuple, rest: tuple[Tensor, Callable, tuple, str]
    ) -> Tensor:
        """rest: the output, backward(grad, *saved, *settings), its settings, and the backend."""
        ctx.save_for_backward(*saved)
        output, ctx.backward_pass, ctx.settings, ctx.backend = rest
        return output

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() or is_in_func() or forward_ad._current_level >= 0:
            _check_derivatives(ctx.backend)
        if grad.is_neg():
            grad = grad.resolve_neg()
        return ctx.backward_pass(grad, *ctx.saved_tensors, *ctx.settings), None, None


def _check_derivatives(backend: str) -> None:
    """What a kernel makes of a gradient would pass for a constant."""
    if backend == "reference":
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the kernels have no second derivative; with create_graph=True use backend='reference'"
        )
    raise BackendError(
        "grad: the kernels' backward pass has no forward mode, nor torch.func (vmap); "
        "use backend='reference'"
    )
