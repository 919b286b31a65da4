"""Shredded-Pork/TempFlow-GRPO: the step of its trunk and that of its branches.

    from flowkern.compat.tempflow import sde_step_with_logprob
    from flowkern.compat.tempflow import sde_step_with_logprob_perstep as sde_step_with_logprob

replace the imports from flow_grpo.diffusers_patch.sd3_sde_with_logprob and
..._perstep, which name both functions alike. What differs: the arithmetic is float32 whatever comes
in; noise_level is an argument, which theirs have as a number in their text (.7, and .9 for FLUX).
"""

from __future__ import annotations

from torch import Tensor

from flowkern.checks import whole_number
from flowkern.ops.sde_step import ode_step
from flowkern.schedules import step_coefficients

from ._grid import grid_of, level_of, per_sample
from ._names import of_scheduler
from ._noise import Generators, drawn_unless, randn_like, refuse_both
from ._scheduler import step_index
from ._step import scored_step


@of_scheduler(x_t="sample", velocity="model_output", x_next="prev_sample")
def sde_step_with_logprob(
    self,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    determistic: bool = False,
    noise_level: float = 0.7,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of Flow-GRPO's sampler: drawn, or replayed where prev_sample is given.

    Args:
        self: the scheduler, any object with `.sigmas` and `.index_for_timestep`.
        model_output, sample: (B, *D) velocity and latent, any floating dtype.
        timestep: (B,) or (1,) timesteps of the scheduler.
        prev_sample: (B, *D), the stored next latent to replay; None: drawn with `generator`, in
            model_output's dtype.
        determistic: prev_sample is Euler's, whatever is given; noise is drawn all the same, so that
            later draws are theirs, and log_prob is that of Euler's point under the SDE.

    Returns:
        prev_sample (B, *D) float32; log_prob (B,), a mean over D; prev_sample_mean (B, *D) float32;
        std = g sqrt(-dt) (B or 1, 1, ...). log_prob and prev_sample_mean are differentiable in
        model_output, prev_sample is not.
    """
    grid, index = _place(self, timestep, sample, noise_level)
    noise = drawn_unless(prev_sample, model_output, generator)
    if determistic:
        prev_sample = ode_step(sample.float(), model_output, per_sample(grid.euler, index))
    edges = per_sample(grid.sampler, index)
    returns = scored_step(sample, model_output, edges, prev_sample, noise)
    return *returns, grid.std[index].reshape(-1, *[1] * (sample.ndim - 1))


@of_scheduler(x_t="sample", velocity="model_output", x_next="prev_sample")
def sde_step_with_logprob_perstep(
    self,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    determistic: bool = False,
    noise_level: float = 0.7,
    num_samples: int = 6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`num_samples` branches of each sample, drawn from one velocity; or with determistic none.

    Arguments as in `sde_step_with_logprob`. prev_sample is refused with a generator, and without
    effect else, as theirs is.

    Returns:
        As `sde_step_with_logprob`, for B num_samples rows in which the branches of a sample follow
        one another; with determistic for the B samples.
    """
    refuse_both(prev_sample, generator)
    whole_number("num_samples", num_samples)
    grid, index = _place(self, timestep, sample, noise_level)
    euler = noise = None
    if determistic:
        euler = ode_step(sample.float(), model_output, per_sample(grid.euler, index))
    else:
        sample, model_output = (x.repeat_interleave(num_samples, 0) for x in (sample, model_output))
        index = index if len(index) == 1 else index.repeat_interleave(num_samples)
        noise = randn_like(model_output, generator)
    returns = scored_step(sample, model_output, per_sample(grid.sampler, index), euler, noise)
    return *returns, grid.std[index].reshape(-1, *[1] * (sample.ndim - 1))


def _place(scheduler, timestep: Tensor, sample: Tensor, noise_level: float):
    """The scheduler's edges, and which of them the timesteps are."""
    level = level_of(noise_level)
    grid = grid_of(scheduler.sigmas, sample.device, step_coefficients, "flow_sde", level)
    return grid, step_index(scheduler, timestep, sample.device)
