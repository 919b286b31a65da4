"""Tencent-Hunyuan/MixGRPO: the steps of fastvideo.utils.sampling_utils, for sampling and training.

    import flowkern.compat.mixgrpo; flowkern.compat.mixgrpo.install()

anywhere before training begins. What differs: bfloat16 velocities are not rounded again when they
are weighed; where a standard deviation is 0, and on a deterministic step of `dpm_step`, the
log-probability is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowkern.ops._common.arguments import check_latents
from flowkern.ops.sde_step import ode_step, sde_step
from flowkern.schedules import Coefficients, multistep_coefficients, step_coefficients

from ._dance import dance_grid, drawn_or_replayed, without_score
from ._grid import Grid, grid_of, level_of, remembered, step_of
from ._install import replace
from ._names import of_grid
from ._noise import drawn_unless, randn_like
from ._step import mean_of, narrow, step_of_grid, x0_of


def install() -> None:
    """Put the steps below in the place of MixGRPO's own, also where they are already imported."""
    ours = (flow_grpo_step, dance_grpo_step, dpm_step, DPMState)
    replace("fastvideo.utils.sampling_utils", "MixGRPO", {f.__name__: f for f in ours})


@of_grid(
    x_t="latents", velocity="model_output", x_next="prev_sample", noise_level="eta or noise_level"
)
def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: torch.Generator | None = None,
    determistic: bool = False,
    sde_type: str = "sde",
    noise_level: float | None = None,
) -> tuple[Tensor, ...]:
    """One step of Flow-GRPO's sampler, or of CPS, by its number in a grid.

    Args:
        model_output, latents: (B, *D) velocity and latent, any floating dtype.
        eta: the noise level of sde_type="sde": g = eta sqrt(sigma / (1 - sigma)).
        sigmas: (S + 1,), falling; index: of the step, 0 to S - 1, a number or a
            tensor.
        prev_sample: (B, *D), the stored next latent to replay; None: drawn with `generator`, in
            model_output's dtype.
        determistic: prev_sample is Euler's, whatever is given; noise is drawn all the same, so that
            later draws are theirs, and log_prob is that of Euler's point under the SDE.
        sde_type: "sde" | "cps". noise_level: in the place of eta, and by default .8 with "cps".

    Returns:
        prev_sample (B, *D) float32; x0 = latents - sigma model_output (B, *D) float32; log_prob
        (B,), a mean over D; the mean (B, *D) float32; std (). log_prob, the mean and x0 are
        differentiable in model_output, prev_sample is not.
    """
    grid = _grid(latents, sigmas, eta, sde_type, noise_level)
    noise = drawn_unless(prev_sample, model_output, generator)
    return tuple(step_of_grid(latents, model_output, grid, index, prev_sample, noise, determistic))


@of_grid(
    x_t="latents", velocity="model_output", x_next="prev_sample", noise_level="eta or noise_level"
)
def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    sde_type: str = "sde",
    noise_level: float | None = None,
) -> tuple[Tensor, ...]:
    """One step with the diffusion coefficient eta, or of CPS, by its number in a grid.

    Args:
        model_output, latents, sigmas, index, prev_sample: as in `flow_grpo_step`; noise is drawn
            in float32 with torch's generator.
        eta: the diffusion coefficient of sde_type="sde"; std = eta sqrt(-dt).
        grpo: with the log-probability.
        sde_solver: the mean with the score's drift, and noise; else prev_sample is the mean,
            which is Euler's (of "cps" its own).
        sde_type: "sde" | "cps". noise_level: in the place of eta, and by default .8 with "cps".

    Returns:
        With grpo prev_sample (B, *D) float32, x0 (B, *D) float32 and log_prob (B,), a mean over D,
        without -log std - log sqrt(2 pi) as theirs is; without it the mean and x0.
    """
    if sde_type == "cps":
        grid = _grid(latents, sigmas, eta, sde_type, noise_level)
    else:
        _check_type(sde_type)
        level = eta if noise_level is None else noise_level
        grid = dance_grid(latents, sigmas, level, sde_solver, normalizer=False)
    if not grpo:
        return without_score(model_output, latents, grid, index)
    if prev_sample is None and not sde_solver:
        prev_sample = mean_of(latents, model_output, grid.sampler[grid.step(index)]).detach()
    return drawn_or_replayed(model_output, latents, grid, index, prev_sample)


@dataclass
class DPMState:
    """The x0 predictions of a path, the latest one last, and how many steps were taken."""

    order: int
    model_outputs: list[Tensor | None] = field(default=None)
    lower_order_nums: int = 0

    def __post_init__(self):
        self.model_outputs = [None] * self.order

    def update(self, model_output: Tensor) -> None:
        self.model_outputs = [*self.model_outputs[1:], model_output]

    def update_lower_order(self) -> None:
        self.lower_order_nums = min(self.lower_order_nums + 1, self.order)


@of_grid(
    x_t="sample", velocity="model_output", noise="variance_noise", sde="sde_solver",
    variant="dpm_solver_type", order="dpm_solver_order",
)  # fmt: skip
def dpm_step(
    args,
    model_output: Tensor,
    sample: Tensor,
    step_index: int | Tensor,
    timesteps,
    sigmas: Tensor,
    dpm_state: DPMState | None = None,
    generator: torch.Generator | None = None,
    variance_noise: Tensor | None = None,
    sde_solver: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of DPM-Solver++, or of SDE-DPM-Solver++.

    Args:
        args: with dpm_algorithm_type ("dpmsolver++"; the other one is refused), dpm_solver_order
            (1 to 3) and dpm_solver_type ("midpoint" | "heun"). With sde_solver orders 1 and 2
            midpoint.
        model_output, sample: (B, *D) velocity and latent, any floating dtype.
        step_index, timesteps, sigmas: the step, of len(timesteps) steps of the grid (S + 1,).
        dpm_state: the path so far, to which x0 is added; None: order 1.
        generator, variance_noise: of sde_solver; noise (B, *D) is drawn in float32.

    Returns:
        prev_sample (B, *D) float32; x0 (B, *D) float32; log_prob (B,), a mean over D: 0 without
        sde_solver, where theirs scores the ODE's point under the SDE. With sde_solver log_prob is
        differentiable in model_output, and so is x0; prev_sample is not.
    """
    step_index = step_of("step_index", step_index, len(timesteps))
    check_latents({"x_t": sample, "velocity": model_output})
    sample, model_output = narrow(sample), narrow(model_output)
    order = _order(args, step_index, len(timesteps), dpm_state)
    edge = _multistep(sigmas, step_index, order, _variant(args, order), sde_solver, sample.device)
    history = () if dpm_state is None else tuple(dpm_state.model_outputs[::-1][: order - 1])
    step = (sample, model_output, edge)
    if not sde_solver:
        prev_sample, x0 = ode_step(*step, history, return_x0=True, out_dtype=torch.float32)
        log_prob = x0.new_zeros(len(x0))
    else:
        grid = grid_of(sigmas, sample.device, step_coefficients, "ode", 0.0)
        x0 = x0_of(sample, model_output, grid, step_index)
        noise = randn_like(x0, generator) if variance_noise is None else variance_noise.to(x0)
        learns = model_output.requires_grad and torch.is_grad_enabled()  # from the mean
        how = {"history": history, "return_mean": learns, "out_dtype": torch.float32}
        prev_sample, log_prob = sde_step(*step, noise, **how)[:2]
    if dpm_state is not None:
        dpm_state.update(x0)
        dpm_state.update_lower_order()
    return prev_sample, x0, log_prob


def _grid(latents: Tensor, sigmas: Tensor, eta: float, sde_type: str, noise_level) -> Grid:
    _check_type(sde_type)
    kind = {"sde": "flow_sde", "cps": "cps"}[sde_type]
    default = 0.8 if sde_type == "cps" else eta
    level = level_of(default if noise_level is None else noise_level)
    return grid_of(sigmas, latents.device, step_coefficients, kind, level)


def _check_type(sde_type: str) -> None:
    if sde_type not in ("sde", "cps"):
        raise ValueError(f"sde_type: expected 'sde' or 'cps', got {sde_type!r}")


def _order(args, index: int, count: int, state: DPMState | None) -> int:
    """In effect on this step: 1 at both ends, 2 at most before the end of a short path."""
    if args.dpm_algorithm_type != "dpmsolver++":
        raise ValueError(
            f"dpm_algorithm_type: expected 'dpmsolver++', got {args.dpm_algorithm_type!r}"
        )
    if state is None or state.lower_order_nums < 1 or index == count - 1:
        return 1
    is_short = index == count - 2 and count < 15
    known = min(state.lower_order_nums, index)  # of this path: a state may have been of another
    return min(args.dpm_solver_order, 2 if is_short else 3, known + 1)


def _variant(args, order: int) -> str:
    return args.dpm_solver_type if order == 2 else "midpoint"


def _multistep(
    sigmas: Tensor, index: int, order: int, variant: str, sde: bool, device
) -> Coefficients:
    def made() -> Coefficients:
        path = sigmas[index + 1 - order : index + 2].cpu()  # waits for a device: once
        return multistep_coefficients(path, order, variant, sde).to(device, torch.float32)

    return remembered(sigmas, ("dpm", index, order, variant, sde, device), made)
