"""Clipped importance-ratio loss of SDE steps, from the velocity on.

    d         = b (velocity - old_velocity)                        (= mean - mean_old)
    log_ratio = k mean_D(d (2 (x_next - mean_old) - d))            ratio="sde": no division by std
              = mean_D((x_next - mean_old) d) / std                ratio="guard"
    kl        = mean_D((mean - mean_ref)^2) / (2 std^2)
    policy    = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(log_ratio)
    loss      = step_weight policy + kl_coef kl

B = samples, R = velocity rows (R <= B: siblings share their parent's), D = elements of one latent.
Source: Flow-GRPO (arXiv 2505.05470); guard: GRPO-Guard (arXiv 2510.22319). The ratio is formed from
differences, because log_prob - old_log_prob has float32 steps as large as the clip range.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowkern.ops._common.arguments import (
    NO_NOISE,
    Noise,
    check_guidance,
    check_index,
    check_latent,
    check_latents,
    check_noise,
    check_per_sample,
    check_rows,
    compute_dtype,
    is_number,
    packed,
)
from flowkern.ops._common.autograd import EagerGradient
from flowkern.ops._common.dispatch import (
    Impl,
    choose,
    is_tracing,
    is_transformed,
    lazily,
    native_why_not,
    no_objection,
    triton_why_not,
)
from flowkern.ops._common.native_calls import as_taken, direct
from flowkern.ops._common.outputs import apart
from flowkern.schedules import Coefficients

from . import native_impl, reference


class PolicyLoss(NamedTuple):
    """loss: (), or (B,) with reduction="none"; differentiable in velocity.

    The rest is (B,) and detached; clipped_low and clipped_high are bool.
    """

    loss: Tensor
    log_ratio: Tensor
    ratio: Tensor
    kl: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


_TRITON = "flowkern.ops.policy_loss.triton_impl"

_IMPLS = (
    Impl("native", native_impl.forward, native_why_not),
    Impl("triton", lazily(_TRITON, "forward"), triton_why_not),
    Impl("reference", reference.policy_loss, no_objection),  # its gradient is autograd's
)
_BACKWARD = {
    "native": native_impl.backward,
    "triton": lazily(_TRITON, "backward"),
}
_FORWARD = {impl.name: impl.call for impl in _IMPLS}


def _forward(
    velocity: Tensor, x_t: Tensor, x_next: Tensor | None, rows: Tensor, row: Tensor | None,
    old_velocity: Tensor | None, noise: Tensor | None, sample_id: Tensor | None,
    step: Tensor | None, velocity_uncond: Tensor | None, velocity_ref: Tensor | None,
    advantage: Tensor, old_log_prob: Tensor | None, step_weight: Tensor | None,
    kl_coef: Tensor | None, seed: int, step_value: int, guidance_scale: float, guard: bool,
    kl_value: float, clip_low: float, clip_high: float, reduction: str, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of PolicyLoss, and the slopes (B, 2) that the backward pass multiplies."""
    source = _source(x_next, noise, seed, sample_id, step, step_value)
    return _FORWARD[kernel](
        velocity, x_t, x_next, rows, advantage, row, old_velocity, old_log_prob, source,
        velocity_uncond, guidance_scale, velocity_ref, kl_coef, kl_value, step_weight,
        clip_low, clip_high, guard, reduction,
    )  # fmt: skip


def _backward(
    grad: Tensor, slopes: Tensor, velocity: Tensor, x_t: Tensor, x_next: Tensor | None,
    rows: Tensor, row: Tensor | None, old_velocity: Tensor | None, noise: Tensor | None,
    sample_id: Tensor | None, step: Tensor | None, velocity_uncond: Tensor | None,
    velocity_ref: Tensor | None, seed: int, step_value: int, guidance_scale: float, guard: bool,
    kernel: str,
) -> Tensor:  # fmt: skip
    source = _source(x_next, noise, seed, sample_id, step, step_value)
    return _BACKWARD[kernel](
        grad, slopes, velocity, x_t, x_next, rows, row, old_velocity, source,
        velocity_uncond, guidance_scale, velocity_ref, guard,
    )  # fmt: skip


def _backward_over(
    residual, grad, slopes, velocity, x_t, x_next, rows, row, old_velocity, noise, sample_id, step,
    velocity_uncond, velocity_ref, seed, step_value, guidance_scale, guard, kernel,
) -> Tensor:  # fmt: skip
    """`_backward` over the residual that the CPU's kernel has kept, in its memory."""
    source = _source(x_next, noise, seed, sample_id, step, step_value)
    return native_impl.backward(
        grad, slopes, velocity, x_t, x_next, rows, row, old_velocity, source,
        velocity_uncond, guidance_scale, velocity_ref, guard, residual,
    )  # fmt: skip


def _source(x_next, noise, seed, sample_id, step, step_value) -> Noise | None:
    return Noise(noise, seed, sample_id, step, step_value) if x_next is None else None


_forward_op = torch.library.custom_op("flowkern::policy_loss", apart(_forward), mutates_args=())
_backward_op = torch.library.custom_op("flowkern::policy_loss_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(velocity, *inputs):
    advantage, reduction = inputs[10], inputs[-2]
    of_samples = lambda *s: advantage.new_empty(advantage.shape + s)  # noqa: E731
    loss = of_samples() if reduction == "none" else advantage.new_empty(())
    clipped = [torch.empty_like(advantage, dtype=torch.bool) for _ in range(2)]
    return loss, of_samples(), of_samples(), of_samples(), *clipped, of_samples(2)


@_backward_op.register_fake
def _(grad, slopes, velocity, *_) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _kept(
    slopes, velocity, x_t, x_next, rows, row, old_velocity, source: Noise, velocity_uncond,
    velocity_ref, guidance_scale, guard, kernel,
) -> tuple[tuple, tuple]:  # fmt: skip
    """What `_backward` takes after the gradient: tensors, and settings. They are inputs, but for
    two slopes per sample: no old velocity for the gradient of a given x_next's sde ratio.
    """
    old = old_velocity if guard or x_next is None else None
    tensors = (
        slopes, velocity, x_t, x_next, rows, row, old, source.given, source.sample_id, source.step,
        velocity_uncond, velocity_ref,
    )  # fmt: skip
    return tensors, (source.seed, source.step_value, guidance_scale, guard, kernel)


def _set_up(ctx, inputs, output) -> None:
    velocity, x_t, x_next, rows, row, old, noise, sample_id, step, uncond, ref, *rest = inputs
    kl_coef, seed, step_value, guidance_scale, guard, kl_value, *_, kernel = rest[3:]
    tensors, ctx.settings = _kept(
        output[-1], velocity, x_t, x_next, rows, row, old,
        Noise(noise, seed, sample_id, step, step_value), uncond,
        None if kl_coef is None and kl_value == 0 else ref, guidance_scale, guard, kernel,
    )  # fmt: skip
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros in place of the gradients that these do not have


_forward_op.register_autograd(
    lambda ctx, grad, *_: (_backward_op(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 23),
    setup_context=_set_up,
)


def policy_loss(
    velocity: Tensor,
    x_t: Tensor,
    x_next: Tensor | None,
    c_rows: Coefficients,
    advantage: Tensor,
    row: Tensor | None = None,
    old_velocity: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    sample_id: Tensor | None = None,
    step: int | Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    velocity_ref: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    step_weight: Tensor | None = None,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    ratio: str = "sde",
    reduction: str = "mean",
    backend: str | None = None,
) -> PolicyLoss:
    """Clipped policy loss with its statistics; see the module for the formulas.

    Args:
        velocity, x_t: (R, *D), float32, bfloat16 or float16 (float64: computed in float64).
        x_next: (B, *D). None, with old_velocity and noise or seed, and float32 states: drawn again,
            which is the x_next of the rollout only where that was stored in float32.
        c_rows: one edge, or B rows, of `flowkern.schedules`.
        advantage: (B,), used as given.
        row: (B,) integers, the velocity row of each sample; None: B == R.
        old_velocity: (R, *D), already guided (in float32, from the same tensors: rounded to
            bfloat16 it moves the ratio more than a clip range): the exact difference form.
        old_log_prob: (B,), for recorded log-probabilities: the log-ratio then carries the float32
            rounding of both (about 1e-7). Not with ratio="guard". With neither, the update is on
            policy: log_ratio is exactly 0, its gradient kept.
        noise, seed, sample_id, step: as in `sde_step`, only with x_next=None.
        velocity_uncond: (R, *D), with guidance_scale; it gets no gradient.
        velocity_ref: (R, *D), already guided, of the reference policy. kl_coef: float or (B,).
        step_weight: (B,), multiplies the policy term and never the KL.
        clip_low, clip_high: the clip range; log_ratio is compared with log1p(-clip_low) and
            log1p(clip_high).
        ratio: "sde" | "guard". reduction: "mean" | "sum" | "none".
        backend: "native" | "triton" | "reference"; None takes the best that can serve.

    Raises:
        ValueError, TypeError naming the argument; BackendError where the named backend cannot
        serve.
    """
    if kernels := direct(backend, velocity):
        output = kernels.policy_forward(
            velocity, x_t, x_next, c_rows, advantage, row, old_velocity, old_log_prob,
            noise, seed, sample_id, step, velocity_uncond, guidance_scale, velocity_ref,
            kl_coef, step_weight, clip_low, clip_high, ratio, reduction, torch.is_grad_enabled(),
        )  # fmt: skip
        if output is not None:
            *output, residual = output
            source = NO_NOISE if x_next is not None else as_taken(noise, seed, sample_id, step)
            has_kl = isinstance(kl_coef, Tensor) or kl_coef != 0
            return _with_gradient(
                output, residual, velocity, x_t, x_next, c_rows.table, row, old_velocity, source,
                velocity_uncond, velocity_ref if has_kl else None, guidance_scale,
                ratio == "guard", "native",
            )  # fmt: skip
    latents = {
        "velocity": velocity, "x_t": x_t, "old_velocity": old_velocity,
        "velocity_ref": velocity_ref, "velocity_uncond": velocity_uncond,
    }  # fmt: skip
    needed = ("velocity", "x_t")
    dtype = check_latents({n: x for n, x in latents.items() if x is not None or n in needed})
    check_guidance(velocity_uncond, guidance_scale, velocity)
    _check_choices(ratio, reduction, clip_low, clip_high, old_velocity, old_log_prob)
    rows, device = velocity.shape[0], velocity.device
    if row is not None:
        row = check_index("row", row, rows, device)
    batch = rows if row is None else len(row)
    shape = (batch, *velocity.shape[1:])
    kl_value = 0.0
    if not isinstance(kl_coef, Tensor):
        if not (is_number(kl_coef) and 0 <= kl_coef < math.inf):
            raise ValueError(f"kl_coef: expected a finite number >= 0 or (B,), got {kl_coef!r}")
        kl_value, kl_coef = float(kl_coef), None
    if velocity_ref is None and (kl_coef is not None or kl_value != 0):
        raise ValueError("velocity_ref: needed for a KL (kl_coef is not 0), got None")
    check_per_sample("advantage", advantage, batch, device)
    optional = {"old_log_prob": old_log_prob, "step_weight": step_weight, "kl_coef": kl_coef}
    for name, value in optional.items():
        if value is not None:
            check_per_sample(name, value, batch, device)
    source = _check_x_next(x_next, shape, velocity, x_t, old_velocity, noise, seed, sample_id, step)
    if compute_dtype(x_next, noise) == torch.float64:
        dtype = torch.float64
    table = check_rows("c_rows", c_rows, batch, device, dtype)
    if c_rows.num_history:
        raise ValueError(
            "c_rows: rows with history weights are deterministic solver steps and are not trained"
        )
    advantage, old_log_prob, step_weight, kl_coef = (
        None if value is None else packed(value, dtype)
        for value in (advantage, old_log_prob, step_weight, kl_coef)
    )
    kernel = _best(device, dtype, backend, is_transformed())
    if kernel == "reference":
        inputs = (
            velocity, x_t, x_next, table, advantage, row, old_velocity, old_log_prob, source,
            velocity_uncond, guidance_scale, velocity_ref, kl_coef, kl_value, step_weight,
            clip_low, clip_high, ratio == "guard", reduction,
        )  # fmt: skip
        return PolicyLoss(*reference.policy_loss(*inputs))
    source = source or NO_NOISE
    others = (
        x_t, x_next, table, row, old_velocity, source.given, source.sample_id,
        source.step, velocity_uncond, velocity_ref, advantage, old_log_prob, step_weight, kl_coef,
        source.seed, source.step_value, float(guidance_scale), ratio == "guard", kl_value,
        float(clip_low), float(clip_high), reduction, kernel,
    )  # fmt: skip
    if is_tracing(velocity, *others[:14]):
        others = [x.detach() if isinstance(x, Tensor) else x for x in others]
        output = _forward_op(velocity, *others)
        return PolicyLoss(*output[:-1])
    output = _forward(velocity, *others)
    return _with_gradient(
        output, None, velocity, x_t, x_next, table, row, old_velocity, source, velocity_uncond,
        None if kl_coef is None and kl_value == 0 else velocity_ref, float(guidance_scale),
        ratio == "guard", kernel,
    )  # fmt: skip


def _with_gradient(output, residual, velocity, *kept) -> PolicyLoss:
    """A kernel's output, the residual it has kept or None, and what `_kept` takes."""
    loss, *statistics, slopes = output
    if velocity.requires_grad and torch.is_grad_enabled():
        tensors, settings = _kept(slopes, velocity, *kept)
        over = None if residual is None else (residual, _backward_over)
        loss = EagerGradient.apply(velocity, tensors, (loss, _backward, settings, kept[-1]), over)
    return PolicyLoss(loss, *statistics)


def _best(device: torch.device, dtype: torch.dtype, backend: str | None, transformed: bool) -> str:
    """The name of the implementation; compilers take it as it is."""
    return choose(_IMPLS, device, dtype, backend, transformed).name


# What torch.compiler.assume_constant_result sets; calling that imports the compiler, and triton.
_best._dynamo_marked_constant = True


def _check_choices(ratio, reduction, clip_low, clip_high, old_velocity, old_log_prob) -> None:
    if ratio not in ("sde", "guard"):
        raise ValueError(f"ratio: expected 'sde' or 'guard', got {ratio!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not (is_number(value) and value >= 0):
            raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
    if clip_low >= 1:
        raise ValueError(f"clip_low: expected 0 <= clip_low < 1, got {clip_low}")
    if old_log_prob is not None:
        if old_velocity is not None:
            raise ValueError(
                "old_log_prob: given together with old_velocity; expected at most one of them"
            )
        if ratio == "guard":
            raise ValueError(
                "old_log_prob: ratio='guard' is not a function of it; expected old_velocity"
            )


def _check_x_next(x_next, shape, velocity, x_t, old_velocity, noise, seed, sample_id, step):
    """The noise from which x_next is drawn again, or None where x_next is given."""
    like = velocity if shape == velocity.shape else velocity.new_empty(1).expand(shape)
    if x_next is not None:
        check_latent("x_next", x_next, like)
        extra = {"noise": noise, "seed": seed, "sample_id": sample_id, "step": step}
        given = [name for name, value in extra.items() if value is not None]
        if given:
            raise ValueError(
                f"{given[0]}: given together with x_next; "
                "expected x_next=None where it is to be drawn again"
            )
        return None
    if old_velocity is None:
        raise ValueError("old_velocity: needed to draw x_next again, got None")
    if x_t.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x_next: only float32 states can be drawn again, got x_t of {x_t.dtype}; pass x_next"
        )
    return check_noise(noise, seed, sample_id, step, like)
