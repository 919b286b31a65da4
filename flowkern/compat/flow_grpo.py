"""yifan123/flow_grpo: its steps with their arguments, definitions and returns.

    from flowkern.compat.flow_grpo import sde_step_with_logprob

replaces the import from flow_grpo.diffusers_patch.sd3_sde_with_logprob (as wan_... that from
wan_pipeline_with_logprob). What differs: one kernel (the step, its log-probability and its mean,
and one for both gradients) instead of some sixty small operations, no host synchronization with
diffusers' own schedulers, and a finite log-probability (0) where the published formula divides by a
standard deviation of 0.
"""

from __future__ import annotations

from torch import Tensor

from flowkern.ops.sde_step import ode_step
from flowkern.schedules import Coefficients, device_coefficients, step_coefficients

from ._grid import grid_of, level_of, per_sample
from ._names import of_scheduler
from ._noise import Generators, drawn_unless, randn_like
from ._scheduler import step_index
from ._step import scored_step

_KINDS = {"sde": "flow_sde", "cps": "cps"}


@of_scheduler(x_t="sample", velocity="model_output", x_next="prev_sample")
def sde_step_with_logprob(
    self,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """One step of Flow-GRPO's sampler: drawn, or replayed where prev_sample is given.

    Args:
        self: the scheduler, any object with `.sigmas` and `.index_for_timestep`.
        model_output, sample: (B, *D) velocity and latent, any floating dtype; computed in float32.
        timestep: (B,) or (1,) timesteps of the scheduler.
        noise_level: of the SDE, or the angle of sde_type="cps".
        prev_sample: (B, *D), the stored next latent to replay. None: drawn, with `generator`.
        return_sqrt_dt: return sqrt(-dt) as a fifth value.

    Returns:
        prev_sample (B, *D) float32; log_prob (B,), a mean over D; prev_sample_mean (B, *D) float32;
        std_dev_t (B or 1, 1, ...), the diffusion coefficient (sde) or standard deviation (cps).
        log_prob and prev_sample_mean are differentiable in model_output, prev_sample is not.
    """
    if sde_type not in _KINDS:
        raise ValueError(f"sde_type: expected one of {tuple(_KINDS)}, got {sde_type!r}")
    grid = grid_of(
        self.sigmas, sample.device, step_coefficients, _KINDS[sde_type], level_of(noise_level)
    )
    index = step_index(self, timestep, sample.device)
    model_output, sample = model_output.float(), sample.float()
    noise = randn_like(model_output, generator) if prev_sample is None else None
    edges = per_sample(grid.sampler, index)
    returns = scored_step(sample, model_output, edges, prev_sample, noise)
    shape = (-1, *[1] * (sample.ndim - 1))
    std_dev_t = grid.g if sde_type == "sde" else grid.std
    returns = (*returns, std_dev_t[index].reshape(shape))
    return (*returns, grid.sqrt_dt[index].reshape(shape)) if return_sqrt_dt else returns


@of_scheduler(x_t="sample", velocity="model_output", x_next="prev_sample")
def wan_sde_step_with_logprob(
    self,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    determistic: bool = False,
    return_pixel_log_prob: bool = False,
    return_dt_and_std_dev_t: bool = False,
) -> tuple[Tensor, ...]:
    """One step of Flow-GRPO's sampler of Wan, whose diffusion coefficient is linear in sigma.

    g = sigmas[-1] + (sigmas[1] - sigmas[-1]) sigma. The name in flow_grpo's
    wan_pipeline_with_logprob is sde_step_with_logprob.

    Args:
        self: the scheduler, any object with `.sigmas` and `.index_for_timestep`, such as UniPC.
        model_output, sample: (B, *D) velocity and latent, any floating dtype; computed in float32.
        timestep: (B,) or (1,) timesteps of the scheduler.
        prev_sample: (B, *D), the stored next latent to replay; or else drawn with `generator`.
        determistic: prev_sample is Euler's, whatever is given; noise is drawn all the same, so that
            later draws are theirs, and log_prob is that of Euler's point under the SDE.
        return_pixel_log_prob: taken, as theirs is, and without effect there, too.
        return_dt_and_std_dev_t: five values, with std_dev_t = g and sqrt(-dt) at the end.

    Returns:
        prev_sample (B, *D) float32; log_prob (B,), a mean over D; prev_sample_mean (B, *D) float32;
        g sqrt(-dt) (B or 1, 1, ...). log_prob and prev_sample_mean are differentiable in
        model_output, prev_sample is not.
    """
    grid = grid_of(self.sigmas, sample.device, wan_coefficients)
    index = step_index(self, timestep, sample.device)
    model_output, sample = model_output.float(), sample.float()
    noise = drawn_unless(prev_sample, model_output, generator)
    if determistic:
        prev_sample = ode_step(sample, model_output, per_sample(grid.euler, index))
    edges = per_sample(grid.sampler, index)
    returns = scored_step(sample, model_output, edges, prev_sample, noise)
    shape = (-1, *[1] * (sample.ndim - 1))
    if return_dt_and_std_dev_t:
        return *returns, grid.g[index].reshape(shape), grid.sqrt_dt[index].reshape(shape)
    return *returns, grid.std[index].reshape(shape)


def wan_coefficients(sigmas: Tensor) -> Coefficients:
    """All edges (S,) of Wan's sampler: dance_sde whose eta is another on each edge."""
    wide = sigmas.detach().double().cpu()
    g = wide[-1] + (wide[1] - wide[-1]) * wide[:-1]
    return device_coefficients(wide[:-1], wide[1:], "dance_sde", g)


@of_scheduler(x_t="sample", velocity="model_output and mean_model_output", x_next="prev_sample")
def ode_step_with_logprob(
    self,
    model_output: Tensor,
    mean_model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """Euler's step by one velocity, scored by its distance from Euler's step by another.

    log_prob = -mean_D((prev_sample - prev_sample_mean)^2), without a variance: nothing is random.

    Args:
        self, timestep: as in `sde_step_with_logprob`.
        model_output: (B, *D), the velocity of the step.
        mean_model_output: (B, *D), the velocity of prev_sample_mean.
        sample: (B, *D) latent.
        noise_level: of the std_dev_t that is returned, and of nothing else.
        prev_sample: (B, *D), taken instead of Euler's step where it is given.
        generator, sde_type: taken, as theirs are, and without effect there, too.
        return_sqrt_dt: return sqrt(-dt) as a fifth value.

    Returns:
        prev_sample (B, *D) float32; log_prob (B,); prev_sample_mean (B, *D) float32; std_dev_t
        (B or 1, 1, ...), the SDE's diffusion coefficient. log_prob and prev_sample_mean are
        differentiable in mean_model_output, prev_sample is not.
    """
    grid = grid_of(self.sigmas, sample.device, step_coefficients, "flow_sde", level_of(noise_level))
    scoring = grid_of(self.sigmas, sample.device, distance_coefficients)
    index = step_index(self, timestep, sample.device)
    edges = per_sample(scoring.sampler, index)
    sample = sample.float()
    if prev_sample is None:
        prev_sample = ode_step(sample, model_output, edges)
    returns = scored_step(sample, mean_model_output.float(), edges, prev_sample)
    shape = (-1, *[1] * (sample.ndim - 1))
    returns = (*returns, grid.g[index].reshape(shape))
    return (*returns, grid.sqrt_dt[index].reshape(shape)) if return_sqrt_dt else returns


def distance_coefficients(sigmas: Tensor) -> Coefficients:
    """All edges (S,) of Euler's step whose log-probability is minus the squared distance: k = 1."""
    return step_coefficients(sigmas, "ode", 0.0).tempered()
