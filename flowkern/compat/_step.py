"""The step as others have it: drawn or replayed, with its log-probability and its mean."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.ops.sde_step import ode_step, sde_log_prob, sde_step
from flowkern.schedules import Coefficients


def scored_step(
    x_t: Tensor,
    velocity: Tensor,
    edges: Coefficients,
    x_next: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_next, its log-probability and the mean: replayed where x_next is given, else drawn with
    noise.

    Args:
        x_t, velocity, x_next, noise: (B, *D).
        edges: one for all samples, or B.

    Returns:
        x_next (B, *D), in float32; log_prob (B,), a mean over D; mean (B, *D) in float32. log_prob
        and mean are differentiable in velocity, x_next is not.
    """
    differentiable = velocity.requires_grad and torch.is_grad_enabled()
    if x_next is None:
        x_next, log_prob = sde_step(x_t, velocity, edges, noise=noise, out_dtype=torch.float32)
        if differentiable:
            log_prob = sde_log_prob(x_t, velocity, x_next, edges)
    else:
        x_next = x_next.float()
        log_prob = sde_log_prob(x_t, velocity, x_next.detach(), edges)
    if differentiable:  # the mean carries a gradient of its own: KL terms use it
        shape = (-1, *[1] * (x_t.ndim - 1))
        mean = edges.a.reshape(shape) * x_t + edges.b.reshape(shape) * velocity
    else:
        mean = ode_step(x_t, velocity, edges, out_dtype=torch.float32)
    return x_next, log_prob, mean
