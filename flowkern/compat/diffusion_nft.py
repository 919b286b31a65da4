"""NVlabs/DiffusionNFT: `run_sampling`, its solvers and what they return.

    from flowkern.compat.diffusion_nft import run_sampling

replaces the import from flow_grpo.diffusers_patch.solver. What differs: one kernel a step; no
progress bar; where a standard deviation is 0 the log-probability is 0 and not NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowkern.ops.sde_step import ode_step
from flowkern.schedules import Coefficients, multistep_coefficients, step_coefficients
from flowkern.schedules.coefficients import checked, stacked

from ._dance import dance_coefficients
from ._grid import grid_of, level_of, remembered
from ._names import of_grid
from ._step import narrow, scored

SOLVERS = ("flow", "dance", "ddim", "dpm1", "dpm2")


@of_grid("sigma_schedule", x_t="z", velocity="the velocity of v_pred_fn", noise_level="eta")
@torch.no_grad()
def run_sampling(
    v_pred_fn: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    sigma_schedule: Tensor,
    solver: str = "flow",
    determistic: bool = False,
    eta: float = 0.7,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """A whole path from noise to latents, without gradient.

    Args:
        v_pred_fn: (latents (B, *D) in z's dtype, sigma) -> velocity (B, *D), any floating dtype.
        z: (B, *D), the first latents.
        sigma_schedule: (S + 1,), falling.
        solver: "flow" (Flow-GRPO's SDE) | "dance" (DanceGRPO's, its log-probability without
            -log std - log sqrt(2 pi) as theirs is) | "ddim" (of eta) | "dpm1" | "dpm2"
            (DPM-Solver++, with determistic alone).
        determistic: eta is 0.
        eta: noise level (flow), diffusion coefficient (dance), or the share of the posterior's
            standard deviation (ddim: 1 is SDE-DPM-Solver++ of order 1, 0 is DDIM).

    Returns:
        The last latents, in z's dtype; all S + 1 of them; S log-probabilities (B,) float32, each of
        the step before it is cast to z's dtype, or of a dpm solver None.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {SOLVERS}, got {solver!r}")
    if solver.startswith("dpm") and not determistic:
        raise ValueError(f"determistic: {solver} has no noise; expected True, got {determistic}")
    sigmas = torch.as_tensor(sigma_schedule)
    step = _dpm(sigmas, z, int(solver[-1])) if solver.startswith("dpm") else None
    step = step or _sde(sigmas, z, solver, 0.0 if determistic else level_of(eta))
    all_latents, all_log_probs = [z], []
    for index in range(len(sigmas) - 1):
        velocity = v_pred_fn(all_latents[-1], sigma_schedule[index])
        latents, log_prob = step(all_latents[-1], velocity, index)
        all_latents.append(latents.to(z.dtype))
        all_log_probs.append(log_prob)
    return all_latents[-1], all_latents, all_log_probs


def _sde(sigmas: Tensor, z: Tensor, solver: str, eta: float) -> Callable:
    make, *arguments = {
        "flow": (step_coefficients, "flow_sde", eta),
        "dance": (dance_coefficients, eta, True, False),
        "ddim": (ddim_coefficients, eta),
    }[solver]
    grid = grid_of(sigmas, z.device, make, *arguments)

    def step(latents: Tensor, velocity: Tensor, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(z.shape, device=z.device)  # with eta = 0, too: their random stream
        return scored(latents, velocity, grid.sampler[index], noise=noise)

    return step


def _dpm(sigmas: Tensor, z: Tensor, order: int) -> Callable:
    def edges() -> list[Coefficients]:
        made, on_host = [], sigmas.cpu()
        for i in range(len(sigmas) - 1):
            used = 1 if i in (0, len(sigmas) - 2) else order
            path = on_host[i + 1 - used : i + 2]
            made.append(multistep_coefficients(path, used).to(z.device, torch.float32))
        return made

    edges = remembered(sigmas, ("dpm", order, z.device), edges)
    x0s: list[Tensor] = []

    def step(latents: Tensor, velocity: Tensor, index: int) -> tuple[Tensor, None]:
        if index in (0, len(edges) - 1):  # drawn and thrown away there
            torch.randn(z.shape, device=z.device)
        history = x0s[: edges[index].num_history]
        x_next, x0 = ode_step(
            narrow(latents), narrow(velocity), edges[index], history, return_x0=True,
            out_dtype=torch.float32,
        )  # fmt: skip
        x0s[:] = [x0]
        return x_next, None

    return step


def ddim_coefficients(sigmas: Tensor, eta: float) -> Coefficients:
    """All edges (S,) of DDIM on flow sigmas: std = eta sigma' sqrt(1 - e^-2h).

    mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) e, with x0 and the noise e that the velocity
    says. The coefficients-preserving step is of this form, too, with another std.
    """
    s = step_coefficients(sigmas, "ode", 0.0).sigma
    n = sigmas[1:].detach().double().cpu()
    std = eta * step_coefficients(sigmas, "dpm_sde", 0.0).std
    if bool((std > n).any()):
        raise ValueError(f"eta: ddim takes one whose noise the next sigma can hold, got {eta}")
    keep = torch.sqrt(n**2 - std**2)
    return checked(stacked((1 - n) + keep, keep * (1 - s) - (1 - n) * s, std, s))
