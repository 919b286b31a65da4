"""bcmi/Granular-GRPO (G2RPO): `flow_grpo_step`, which both of its scripts define for themselves.

Delete the definition (fastvideo/train_g2rpo_hps.py, train_g2rpo_hps_clip.py) and import it from
here. What differs: bfloat16 velocities are not rounded again when they are weighed; where eta is 0,
as on all steps but one, the log-probability is 0 and not NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowkern.schedules import step_coefficients

from ._grid import grid_of, level_of
from ._names import of_grid
from ._noise import drawn_unless
from ._step import scored_with_x0


@of_grid(x_t="latents", velocity="model_output", x_next="prev_sample", noise_level="eta")
def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Flow-GRPO's sampler, by its number in a grid.

    Args:
        model_output, latents: (B, *D) velocity and latent, any floating dtype.
        eta: the noise level; g = eta sqrt(sigma / (1 - sigma)).
        sigmas: (S + 1,), falling; index: of the step, 0 to S - 1, a number or a
            tensor.
        prev_sample: (B, *D), the stored next latent to replay; None: drawn with `generator`, in
            model_output's dtype. Also where eta is 0, so that later draws are theirs.

    Returns:
        prev_sample (B, *D) float32; x0 = latents - sigma model_output (B, *D) float32; log_prob
        (B,), a mean over D. log_prob and x0 are differentiable in model_output.
    """
    grid = grid_of(sigmas, latents.device, step_coefficients, "flow_sde", level_of(eta))
    noise = drawn_unless(prev_sample, model_output, generator)
    return scored_with_x0(latents, model_output, grid, index, prev_sample, noise)
