"""SGLang's diffusion server: the rollout step of its schedulers.

    import flowkern.compat.sglang; flowkern.compat.sglang.install()

before the server starts. What stays SGLang's: the noise, its buffer and its shards
(`_rollout_variance_noise`), what is recorded of a step, and the ODE step, bit for bit. What
differs: two kernels instead of some thirty small operations; where a standard deviation is 0, the
log-probability is 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowkern.ops.sde_step import ode_step, sde_step
from flowkern.schedules import Coefficients, device_coefficients

from ._grid import level_of
from ._names import naming
from ._peer import attribute, imported
from ._step import narrow

MODULE = "sglang.multimodal_gen.runtime.post_training.scheduler_rl_mixin"
_KINDS = {"sde": "flow_sde", "cps": "cps"}


def install() -> None:
    """Put `flow_sde_sampling` into SGLang's SchedulerRLMixin, and so into all its schedulers.

    A version without that class, or whose class has no such step to replace, is refused.
    """
    mixin = attribute(imported(MODULE, "SGLang"), "SchedulerRLMixin", "SGLang")
    attribute(mixin, "flow_sde_sampling", "SGLang")  # one that nothing calls would serve nobody
    mixin.flow_sde_sampling = flow_sde_sampling


@naming(
    x_t="sample", velocity="model_output", sigma="current_sigma", sigma_next="next_sigma",
    noise_level="rollout_noise_level",
)  # fmt: skip
def flow_sde_sampling(
    self,
    batch: Any,
    model_output: Tensor,
    sample: Tensor,
    current_sigma: Tensor,
    next_sigma: Tensor,
    generator: torch.Generator | list[torch.Generator],
) -> Tensor:
    """One step of a rollout: the next latents; its log-probability is appended to the session.

    Args:
        self: a scheduler with SGLang's SchedulerRLMixin.
        batch: with rollout_sde_type ("sde" | "cps" | "ode"), rollout_noise_level,
            rollout_log_prob_no_const (minus the sum of squares alone), rollout_debug_mode and
            rollout_sde_step_indices: the steps that are not the ODE's.
        model_output, sample: (B, *D) velocity and latent; with sequence parallelism a shard.
        current_sigma, next_sigma: () or (1,), on their device; the host does not read them.
        generator: one for each sample.

    Returns:
        (B, *D): float32, or of an ODE step what torch makes of sample + dt model_output. Appended
        are the sum over the whole latent, all shards of it, and the number of elements, (B,) each.
    """
    session = self._get_rollout_session_data(batch)
    kind = _kind(batch)
    if kind == "ode":
        x_next = sample + (next_sigma - current_sigma) * model_output
        noise, std = torch.zeros_like(model_output), model_output.new_zeros(())
        sums = torch.zeros(session.latents_shape[0], device=sample.device)
        mean, count = x_next, math.prod(session.latents_shape[1:])
    else:
        velocity = model_output = model_output.float()
        noise = self._rollout_variance_noise(batch, velocity, generator)
        edge = _edge(current_sigma, next_sigma, _KINDS[kind], batch, session.sigma_max)
        edge = edge.tempered().to(sample.device)  # log_prob is minus the mean square
        sample = narrow(sample)
        x_next, log_prob = sde_step(sample, velocity, edge, noise=noise, out_dtype=torch.float32)
        std, full, mean = edge.std, session.noise_buffer, None
        count = full[0].numel()
        if noise.shape == full.shape:
            squares = -count * log_prob
        else:  # of all shards, so that every process records the same
            squares = torch.linalg.vector_norm(full.flatten(1), dim=1).square() * std**2
        sums = _log_prob(squares, count, std, batch.rollout_log_prob_no_const)
    if getattr(batch, "rollout_debug_mode", False):
        if mean is None:
            mean = ode_step(sample, velocity, edge, out_dtype=torch.float32)
        self.append_local_rollout_debug_tensors(
            batch, variance_noise=noise, prev_sample_mean=mean, noise_std_dev=std,
            model_output=model_output,
        )  # fmt: skip
    self.append_local_rollout_log_probs(batch, sums, torch.full_like(sums, float(count)))
    return x_next


def _kind(batch: Any) -> str:
    """Of this step: the rollout's, or "ode" outside of its stochastic steps."""
    kind, without_constant = batch.rollout_sde_type, batch.rollout_log_prob_no_const
    if kind not in (*_KINDS, "ode"):
        raise ValueError(f"rollout_sde_type: expected 'sde', 'cps' or 'ode', got {kind!r}")
    if kind == "ode":
        if not without_constant:
            raise ValueError(
                "rollout_log_prob_no_const: an ODE has no density; expected True, got False"
            )
        return kind
    if not (level_of(batch.rollout_noise_level) or without_constant):
        raise ValueError(
            f"rollout_noise_level: a density takes a level above 0, got {batch.rollout_noise_level}"
        )
    steps = getattr(batch, "rollout_sde_step_indices", None)
    step = getattr(batch, "_rollout_loop_step_index", None)
    return "ode" if None not in (steps, step) and step not in steps else kind


def _edge(
    sigma: Tensor, sigma_next: Tensor, kind: str, batch: Any, sigma_max: float
) -> Coefficients:
    level = level_of(batch.rollout_noise_level)
    for name, x in (("current_sigma", sigma), ("next_sigma", sigma_next)):
        if x.numel() != 1:
            raise ValueError(f"{name}: expected one for all samples, got shape {tuple(x.shape)}")
    return device_coefficients(sigma.reshape(()), sigma_next.reshape(()), kind, level, sigma_max)


def _log_prob(squares: Tensor, count: int, std: Tensor, without_constant: bool) -> Tensor:
    """(B,) sums over the latents, from those of (x_next - mean)^2; 0 where std is 0."""
    if without_constant:
        return -squares
    safe = torch.where(std > 0, std, 1.0)
    sums = -squares / (2 * safe**2) - count * (torch.log(safe) + 0.5 * math.log(2 * math.pi))
    return torch.where(std > 0, sums, 0.0)
