"""DanceGRPO's step, with a constant diffusion coefficient, as its scripts and others have it."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.schedules import Coefficients, step_coefficients

from ._grid import Grid, grid_of, level_of
from ._step import mean_of, scored_with_x0, x0_of


def dance_coefficients(
    sigmas: Tensor, eta: float, sde_solver: bool = True, normalizer: bool = True
) -> Coefficients:
    """All edges (S,) with g = eta.

    sde_solver False: the mean is Euler's, the standard deviation as before. normalizer False: the
    log-probability is without -log std - log sqrt(2 pi).
    """
    table = step_coefficients(sigmas, "dance_sde", eta).table.clone()
    if not sde_solver:
        table[:, :2] = step_coefficients(sigmas, "ode", 0.0).table[:, :2]
    edges = Coefficients(table)
    return edges if normalizer else edges.without_normalizer()


def dance_grid(
    latents: Tensor, sigmas: Tensor, eta: float, sde_solver: bool = True, normalizer: bool = True
) -> Grid:
    choices = (level_of(eta), bool(sde_solver), bool(normalizer))
    return grid_of(sigmas, latents.device, dance_coefficients, *choices)


def drawn_or_replayed(
    model_output: Tensor, latents: Tensor, grid: Grid, index: int, prev_sample: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x_next, x0 and log_prob; noise is drawn in float32 with torch's own generator."""
    noise = None
    if prev_sample is None:
        noise = torch.randn_like(latents, dtype=torch.float32)
    return scored_with_x0(latents, model_output, grid, index, prev_sample, noise)


def without_score(
    model_output: Tensor, latents: Tensor, grid: Grid, index: int
) -> tuple[Tensor, Tensor]:
    """The mean and x0 alone."""
    index = grid.step(index)
    mean = mean_of(latents, model_output, grid.sampler[index])
    return mean, x0_of(latents, model_output, grid, index)
