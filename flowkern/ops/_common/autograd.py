"""Gradients of kernels in eager mode, without the dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import BackendError, is_in_func

_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by is_grads_batched=True: no memory


class EagerGradient(torch.autograd.Function):
    """Gives a kernel's output its gradient in `velocity`, for less than the dispatcher's price.

    All but the velocity comes in tuples, and one output goes out: each argument and each output of
    a Function costs, and so does a setup_context.

    A forward pass may have kept a tensor that becomes the gradient: the first backward pass takes
    it; another (retain_graph) computes from what is saved, to the same bits.
    """

    @staticmethod
    def forward(
        ctx,
        velocity: Tensor,
        saved: tuple,
        rest: tuple[Tensor, Callable, tuple, str],
        kept: tuple[Tensor, Callable] | None = None,
    ) -> Tensor:
        """rest: the output, backward(grad, *saved, *settings), its settings, and the backend.

        kept: a tensor that nobody else has, and over_kept(kept, grad, *saved, *settings), which
        writes the gradient over it.
        """
        ctx.save_for_backward(*saved)
        output, ctx.backward_pass, ctx.settings, ctx.backend = rest
        ctx.kept = kept
        return output

    @staticmethod
    def backward(ctx, grad):
        transformed = is_in_func() or forward_ad._current_level >= 0 or _is_batched(grad)
        if transformed or torch.is_grad_enabled():
            _check_derivatives(ctx.backend)
        if grad.is_neg():
            grad = grad.resolve_neg()
        saved = ctx.saved_tensors  # raises where an input has changed, also where none is read
        if ctx.kept is None:
            return ctx.backward_pass(grad, *saved, *ctx.settings), None, None, None
        (kept, over_kept), ctx.kept = ctx.kept, None
        return over_kept(kept, grad, *saved, *ctx.settings), None, None, None


def _check_derivatives(backend: str) -> None:
    """What a kernel makes of a gradient would pass for a constant."""
    if backend == "reference":
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the kernels have no second derivative; with create_graph=True use backend='reference'"
        )
    raise BackendError(
        "grad: the kernels' backward pass has no forward mode, nor torch.func (vmap), nor "
        "is_grads_batched=True; use backend='reference'"
    )
