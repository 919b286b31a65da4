"""Classifier-free guidance that keeps the length of every token.

    guided = uncond + guidance_scale (velocity - uncond)
    out    = guided |velocity| / |guided|            (lengths of a token)

B = samples. Arithmetic in float32; in float64 where an input is float64 (reference only).
Source: the pipelines of Qwen-Image and Lumina2 in diffusers; docs/ops/guidance.md.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from flowkern.ops._common.arguments import check_guidance, check_latents, compute_dtype
from flowkern.ops._common.autograd import plain_gradient
from flowkern.ops._common.dispatch import (
    Impl,
    choose,
    is_tracing,
    is_transformed,
    lazily,
    native_cpu_why_not,
    no_objection,
    triton_why_not,
)

from . import native_impl, reference
from .inputs import GuidanceInputs

_TRITON = "flowkern.ops.guidance.triton_impl"


def _impls(way: str) -> tuple[Impl, ...]:
    return (
        Impl("native", getattr(native_impl, way), native_cpu_why_not),
        Impl("triton", lazily(_TRITON, way), triton_why_not),
        Impl("reference", getattr(reference, way), no_objection),
    )


_FORWARD, _BACKWARD = _impls("forward"), _impls("backward")
_GRADIENT = {impl.name: impl.call for impl in _BACKWARD}


@torch.library.custom_op("flowkern::rescaled_guidance", mutates_args=())
def _op(
    velocity: Tensor,
    velocity_uncond: Tensor,
    guidance_scale: float,
    patch_rows: int,
    patch_width: int,
    backend: str | None,
) -> Tensor:
    i = GuidanceInputs(velocity, velocity_uncond, guidance_scale, patch_rows, patch_width)
    return _chosen(_FORWARD, i, backend).call(i)


@_op.register_fake
def _(velocity, velocity_uncond, *_) -> Tensor:
    return velocity.new_empty(velocity.shape, dtype=compute_dtype(velocity, velocity_uncond))


@torch.library.custom_op("flowkern::rescaled_guidance_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor,
    guidance_scale: float,
    patch_rows: int,
    patch_width: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    i = GuidanceInputs(velocity, velocity_uncond, guidance_scale, patch_rows, patch_width)
    return _chosen(_BACKWARD, i, backend).call(i, grad, True)


@_backward_op.register_fake
def _(grad, velocity, velocity_uncond, *_) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (velocity, velocity_uncond))


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.settings = inputs[2:]


def _backward(ctx, grad: Tensor):
    gradients = _backward_op(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None, None


_op.register_autograd(_backward, setup_context=_save_inputs)


class _Eager(torch.autograd.Function):
    """A kernel and its gradient without the dispatcher."""

    @staticmethod
    def forward(ctx, velocity: Tensor, velocity_uncond: Tensor, settings: tuple, impl: Impl):
        ctx.save_for_backward(velocity, velocity_uncond)
        ctx.settings, ctx.name = settings, impl.name
        return impl.call(GuidanceInputs(velocity, velocity_uncond, *settings))

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = plain_gradient(grad, ctx.name)
        inputs = GuidanceInputs(*ctx.saved_tensors, *ctx.settings)
        wants = ctx.needs_input_grad
        first, second = _GRADIENT[ctx.name](inputs, grad, wants[1])
        return first if wants[0] else None, second, None, None


def rescaled_guidance(
    velocity: Tensor,
    velocity_uncond: Tensor,
    guidance_scale: float,
    patch: tuple[int, int],
    backend: str | None = None,
) -> Tensor:
    """The guided velocity, with every token as long as in `velocity`.

    Differentiable in both velocities: detach the one that is a constant.

    Args:
        velocity, velocity_uncond: (B, C, ...), any strides, conditional and not; float32, bfloat16
            or float16 (float64: the reference).
        guidance_scale: w of uncond + w (velocity - uncond).
        patch: rows and columns of a token, which divide the last two dimensions: all channels of so
            many neighbors, (2, 2) of Qwen-Image's latents (16, h, w). A dimension that is not there
            is 1 long. Lumina2's rows are (1, w) of (1, 16 h, w).
        backend: "native" | "triton" | "reference"; None takes the best that can serve.

    Returns:
        (B, C, ...) float32. A token whose guided velocity is 0 has no direction, and is NaN; one
        whose `velocity` is 0 is 0, and so are its gradients.

    Raises:
        ValueError, TypeError: an argument is off; the message names it. BackendError: the backend
            named cannot serve.
    """
    dtype = check_latents({"velocity": velocity, "velocity_uncond": velocity_uncond})
    check_guidance(velocity_uncond, guidance_scale, velocity)
    settings = (float(guidance_scale), *_check_patch(patch, velocity))
    transformed = is_transformed()
    if is_tracing(velocity, velocity_uncond) and not transformed:
        return _op(velocity, velocity_uncond, *settings, backend)
    impl = choose(_FORWARD, velocity.device, dtype, backend, transformed)
    if transformed or velocity.numel() == 0:  # the reference, which torch differentiates
        return reference.forward(GuidanceInputs(velocity, velocity_uncond, *settings))
    return _Eager.apply(velocity, velocity_uncond, settings, impl)


def _check_patch(patch: tuple[int, int], velocity: Tensor) -> tuple[int, int]:
    sizes = (1, 1, *velocity.shape[2:])[-2:]
    try:
        rows, width = map(operator.index, patch)
    except (TypeError, ValueError):
        raise TypeError(f"patch: expected two integers, rows and columns, got {patch!r}") from None
    if rows < 1 or width < 1 or sizes[0] % rows or sizes[1] % width:
        raise ValueError(f"patch: expected what divides {sizes[0]} x {sizes[1]}, got {patch!r}")
    return rows, width


def _chosen(impls: tuple[Impl, ...], i: GuidanceInputs, backend: str | None) -> Impl:
    return choose(impls, i.velocity.device, compute_dtype(*i[:2]), backend)
