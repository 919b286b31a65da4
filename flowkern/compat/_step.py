"""The step as others have it: drawn or replayed, with its log-probability and its mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowkern.ops.sde_step import ode_step, sde_log_prob, sde_step
from flowkern.schedules import Coefficients

from ._grid import Grid


def scored_step(
    x_t: Tensor,
    velocity: Tensor,
    edges: Coefficients,
    x_next: Tensor | None = None,
    noise: Tensor | None = None,
    round_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_next, its log-probability and the mean: replayed where x_next is given, else drawn with
    noise.

    Args:
        x_t, velocity, x_next, noise: (B, *D).
        edges: one for all samples, or B.
        round_dtype: what is drawn goes through it, and log_prob is of what it has become.

    Returns:
        x_next (B, *D), in float32; log_prob (B,), a mean over D; mean (B, *D) in float32. log_prob
        and mean are differentiable in velocity, x_next is not.
    """
    x_t, velocity = narrow(x_t), narrow(velocity)
    if x_next is None:
        stored = _stored(round_dtype)
        return sde_step(x_t, velocity, edges, narrow(noise), return_mean=True, **stored)
    x_next = x_next.float()
    return x_next, *sde_log_prob(x_t, velocity, _saved(x_next), edges, return_mean=True)


def scored(
    x_t: Tensor,
    velocity: Tensor,
    edges: Coefficients,
    x_next: Tensor | None = None,
    noise: Tensor | None = None,
    round_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`scored_step` without the mean."""
    x_t, velocity = narrow(x_t), narrow(velocity)
    if x_next is None:
        learns = velocity.requires_grad and torch.is_grad_enabled()  # from the mean
        stored = _stored(round_dtype)
        return sde_step(x_t, velocity, edges, narrow(noise), return_mean=learns, **stored)[:2]
    x_next = x_next.float()
    return x_next, sde_log_prob(_saved(x_t), velocity, _saved(x_next), edges)


def narrow(x: Tensor | None) -> Tensor | None:
    """float64 as float32, in which the drop-ins compute whatever comes in; all else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x


def _saved(x: Tensor) -> Tensor:
    """What the backward pass reads. Of a rollout in inference mode autograd saves nothing; the
    projects' formulas, which save their own differences, take it.
    """
    x = x.detach()
    if torch.compiler.is_compiling():  # which cannot ask
        return x
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def _stored(round_dtype: torch.dtype) -> dict[str, torch.dtype]:
    """x_next in float32, through a dtype that is narrower, or not."""
    is_wide = round_dtype == torch.float64
    return {"round_dtype": None if is_wide else round_dtype, "out_dtype": torch.float32}


def mean_of(x_t: Tensor, velocity: Tensor, edges: Coefficients) -> Tensor:
    """a x_t + b velocity, (B, *D) in float32, with its gradient in velocity: KL terms use it."""
    x_t, velocity = narrow(x_t.detach()), narrow(velocity)
    if not (velocity.requires_grad and torch.is_grad_enabled()):
        return ode_step(x_t, velocity, edges, out_dtype=torch.float32)
    shape = (-1, *[1] * (x_t.ndim - 1))
    return edges.a.reshape(shape) * x_t.float() + edges.b.reshape(shape) * velocity.float()


class Step(NamedTuple):
    """What functions that take a grid and an index return, in some order."""

    x_next: Tensor
    x0: Tensor
    log_prob: Tensor
    mean: Tensor
    std: Tensor
    """() g sqrt(-dt)"""


def step_of_grid(
    x_t: Tensor,
    velocity: Tensor,
    grid: Grid,
    index: int,
    x_next: Tensor | None = None,
    noise: Tensor | None = None,
    is_euler: bool = False,
) -> Step:
    """Edge `index` of a grid for all samples, with its mean.

    is_euler: x_next is Euler's, scored as if drawn.
    """
    index = grid.step(index)
    edge = grid.sampler[index]
    if is_euler:
        x_next = ode_step(x_t, velocity, grid.euler[index], out_dtype=torch.float32)
    x_next, log_prob, mean = scored_step(x_t, velocity, edge, x_next, noise)
    return Step(x_next, x0_of(x_t, velocity, grid, index), log_prob, mean, grid.std[index])


def scored_with_x0(
    x_t: Tensor,
    velocity: Tensor,
    grid: Grid,
    index: int,
    x_next: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_next, x0 and log_prob of edge `index` of a grid for all samples."""
    index = grid.step(index)
    x_next, log_prob = scored(x_t, velocity, grid.sampler[index], x_next, noise)
    return x_next, x0_of(x_t, velocity, grid, index), log_prob


def x0_of(x_t: Tensor, velocity: Tensor, grid: Grid, index: int) -> Tensor:
    """x_t - sigma velocity, (B, *D) in float32."""
    return torch.sub(x_t.float(), narrow(velocity), alpha=grid.sigmas[index])
