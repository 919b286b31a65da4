"""yifan123/flow_grpo: `sde_step_with_logprob`, its arguments, definitions and four returns.

    from flowkern.compat.flow_grpo import sde_step_with_logprob

replaces the import from flow_grpo.diffusers_patch.sd3_sde_with_logprob. What differs: two kernels
(the step with its log-probability, and the mean) instead of some sixty small operations, no host
synchronization with diffusers' own schedulers, and a finite log-probability (0) where the published
formula divides by a standard deviation of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flowkern.schedules import Coefficients, step_coefficients

from ._noise import randn_like
from ._scheduler import step_index
from ._step import scored_step

_KINDS = {"sde": "flow_sde", "cps": "cps"}


@dataclass(frozen=True)
class _Grid:
    """All edges of a scheduler's sigmas; std_dev_t and sqrt(-dt) as returned, (S,) float32."""

    coefficients: Coefficients
    std_dev_t: Tensor
    sqrt_dt: Tensor


# sigmas -> {(version, kind, noise level, device): _Grid}
_grids: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def sde_step_with_logprob(
    self,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
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
    grid = _grid(self.sigmas, _KINDS[sde_type], float(noise_level), sample.device)
    index = step_index(self, timestep, sample.device)
    edges = (
        grid.coefficients[index]
        if len(index) > 1
        else Coefficients(grid.coefficients.table[index][0])
    )
    model_output, sample = model_output.float(), sample.float()
    noise = randn_like(model_output, generator) if prev_sample is None else None
    prev_sample, log_prob, mean = scored_step(sample, model_output, edges, prev_sample, noise)
    shape = (-1, *[1] * (sample.ndim - 1))
    returns = (prev_sample, log_prob, mean, grid.std_dev_t[index].reshape(shape))
    return (*returns, grid.sqrt_dt[index].reshape(shape)) if return_sqrt_dt else returns


def _grid(sigmas: Tensor, kind: str, noise_level: float, device: torch.device) -> _Grid:
    """The coefficients of a scheduler's sigmas: computed when first seen, or edited in place."""
    known = _grids.setdefault(sigmas, {})
    version = None if sigmas.is_inference() else sigmas._version
    key = (version, kind, noise_level, device)
    if key not in known:
        coefficients = step_coefficients(sigmas, kind, noise_level)
        dt = sigmas.double().cpu().diff()
        sqrt_dt = torch.sqrt(-dt)
        std_dev_t = coefficients.std / sqrt_dt if kind == "flow_sde" else coefficients.std
        known[key] = _Grid(
            coefficients.to(device, torch.float32),
            std_dev_t.to(device, torch.float32),
            sqrt_dt.to(device, torch.float32),
        )
    return known[key]
