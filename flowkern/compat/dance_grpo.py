"""XueZeyue/DanceGRPO: `flux_step`, which each of its scripts defines for itself.

Delete the definition (fastvideo/train_grpo_*.py) and import it from here. What differs: bfloat16
velocities are not rounded again when they are weighed, so the log-probability is exact to 5e-8
where theirs is off by up to twice their clip of 1e-4; where the standard deviation is 0, the
log-probability is 0.
"""

from __future__ import annotations

from torch import Tensor

from ._dance import dance_grid, drawn_or_replayed, without_score
from ._names import of_grid


@of_grid(x_t="latents", velocity="model_output", x_next="prev_sample", noise_level="eta")
def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    """One step of a grid with the diffusion coefficient eta.

    Args:
        model_output, latents: (B, *D) velocity and latent, any floating dtype.
        eta: the diffusion coefficient; std = eta sqrt(-dt).
        sigmas: (S + 1,), falling; index: of the step, 0 to S - 1, a number or a
            tensor.
        prev_sample: (B, *D), the stored next latent to replay; None: drawn with torch's generator.
        grpo: with the log-probability.
        sde_solver: the mean with the score's drift; else it is Euler's, and prev_sample has noise
            all the same.

    Returns:
        With grpo prev_sample (B, *D) float32, x0 = latents - sigma model_output (B, *D) float32 and
        log_prob (B,), a mean over D; without it the mean and x0. log_prob, the mean and x0 are
        differentiable in model_output, prev_sample is not.
    """
    grid = dance_grid(latents, sigmas, eta, sde_solver)
    if not grpo:
        return without_score(model_output, latents, grid, index)
    return drawn_or_replayed(model_output, latents, grid, index, prev_sample)
