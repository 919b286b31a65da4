"""Gradients of kernels in eager mode, without the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern import torch_private as private

from .arguments import check_guidance
from .dispatch import BackendError, is_transformed


class _OfBoth(torch.autograd.Function):
    """The first half: its gradient is w times that of the guided velocity, and 1 - w times that is
    the second half's."""

    @staticmethod
    def forward(ctx, velocity: Tensor, uncond: Tensor, scale: float) -> Tensor:
        ctx.share, ctx.dtype = (1 - scale) / scale, uncond.dtype
        return velocity.view_as(velocity)

    @staticmethod
    def backward(ctx, grad):
        share = (grad * ctx.share).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad, share, None


def of_both(velocity: Tensor, uncond: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Both halves of guidance for an op that differentiates the first: the second gets its share.

    Raises ValueError without a second half, or where the first has no share: a scale of 0.
    """
    if uncond is None:
        raise ValueError("uncond_gradient: needs velocity_uncond, got None")
    check_guidance(uncond, scale, velocity)
    if scale == 0:
        raise ValueError("uncond_gradient: velocity has no share where guidance_scale is 0")
    if is_transformed():  # torch.func and forward mode take no Function of this kind
        return velocity + (1 - scale) / scale * (uncond - uncond.detach()), uncond.detach()
    return _OfBoth.apply(velocity, uncond, scale), uncond.detach()


class EagerGradient(torch.autograd.Function):
    """Gives a kernel's output its gradient in one input, for less than the dispatcher's price.

    All but that input comes in one tuple, and one output goes out: each argument and each output of
    a Function costs, and so does a setup_context.

    A forward pass may have kept a tensor that becomes the gradient: the first backward pass takes
    it; another (retain_graph) computes from what is saved, to the same bits.
    """

    @staticmethod
    def forward(ctx, of: Tensor, rest: tuple[Tensor, tuple, tuple, Tensor | None]) -> Tensor:
        """rest: the output; the tensors that are saved; how: backward(grad, saved, settings,
        backend, kept), its settings, and the backend; and what is kept, or None: a tensor that
        nobody else has, which backward writes over.
        """
        output, saved, ctx.how, ctx.kept = rest
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx, grad):
        backward_pass, settings, backend = ctx.how
        grad = plain_gradient(grad, backend)
        saved = ctx.saved_tensors  # raises where an input has changed, also where none is read
        kept, ctx.kept = ctx.kept, None
        return backward_pass(grad, saved, settings, backend, kept), None


def plain_gradient(grad: Tensor, backend: str) -> Tensor:
    """A gradient that comes in, as a kernel's backward pass takes it.

    Raises what `check_derivatives` does where more is asked for than the kernel has.
    """
    if is_transformed() or private.is_batched(grad) or torch.is_grad_enabled():
        check_derivatives(backend)
    return grad.resolve_neg() if grad.is_neg() else grad


def check_derivatives(backend: str) -> None:
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
