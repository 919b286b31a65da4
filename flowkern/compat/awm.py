"""scxue/advantage_weighted_matching: `compute_log_prob_awm`, which its script defines for itself.

Delete the definition (scripts/train_sd3_awm.py) and import it from here. What differs: the squared
error is one pass in float32 and not eight in float64, its mean and what follows are float64 as
theirs; the velocity is returned in float32, and the script's KL terms are computed in that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flowkern.ops.sde_step import sde_log_prob
from flowkern.schedules import COLUMNS, Coefficients

from ._names import naming

WEIGHTINGS = ("Uniform", "t", "t**2", "huber", "ghuber")


@naming(x_t="clean_latents", velocity="the transformer's answer", x_next="random_noise")
def compute_log_prob_awm(
    transformer,
    pipeline,
    sample,
    timestep: Tensor,
    embeds: Tensor,
    pooled_embeds: Tensor,
    config: Any,
    noised_latents: Tensor,
    clean_latents: Tensor,
    random_noise: Tensor,
    weighting: str = "Uniform",
) -> tuple[Tensor, Tensor, Tensor]:
    """The surrogate log-likelihood -w(M), M = mean_D((velocity - (noise - x0))^2).

    Args:
        transformer: asked as a diffusers SD3 transformer is, at 1000 timestep.
        pipeline, sample: taken, as theirs are, and without effect there, too.
        timestep: sigma of each sample, (B, 1, ...).
        embeds, pooled_embeds: the transformer's text; with config.train.cfg of both halves.
        config: with train.cfg, sample.guidance_scale where that is set, and train.ghuber_power.
        noised_latents, clean_latents, random_noise: (B, *D), any floating dtype.
        weighting: "Uniform" -M | "t" -t M | "t**2" -t^2 M | "huber" -t (sqrt(M + 1e-10) - 1e-5) |
            "ghuber" -(t / p) ((M + 1e-10)^p - 1e-10^p) with p = config.train.ghuber_power.

    Returns:
        (B,) float64, differentiable in the transformer's answer; the velocity (B, *D) float32, as
        guided; .7 sqrt(t / (1 - min(t, .99))), in timestep's shape.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {WEIGHTINGS}, got {weighting!r}")
    if timestep.numel() not in (1, len(noised_latents)):
        raise ValueError(
            f"timestep: expected one for each of {len(noised_latents)} samples, got shape "
            f"{tuple(timestep.shape)}"
        )
    t, copies = timestep.view(-1), 2 if config.train.cfg else 1
    velocity = transformer(
        hidden_states=torch.cat([noised_latents] * copies) if copies > 1 else noised_latents,
        timestep=torch.cat([t * 1000] * copies) if copies > 1 else t * 1000,
        encoder_hidden_states=embeds,
        pooled_projections=pooled_embeds,
        return_dict=False,
    )[0]
    if config.train.cfg:
        uncond, text = velocity.chunk(2)
        velocity = uncond + config.sample.guidance_scale * (text - uncond)
    velocity = velocity.float()
    error = -sde_log_prob(clean_latents, velocity, random_noise, _edge(velocity.device)).double()
    power = config.train.ghuber_power if weighting == "ghuber" else None
    std = 0.7 * torch.sqrt(timestep / (1 - timestep.clamp(0, 0.99)))
    return -_weighted(error, t, weighting, power), velocity, std


def _weighted(error: Tensor, t: Tensor, weighting: str, power: float | None) -> Tensor:
    if weighting == "huber":
        return t * (torch.sqrt(error + 1e-10) - 1e-5)
    if weighting == "ghuber":
        return t / power * ((error + 1e-10) ** power - 1e-10**power)
    return error * {"Uniform": 1.0, "t": t, "t**2": t**2}[weighting]


@functools.cache
def _edge(device: torch.device) -> Coefficients:
    """log_prob = -mean_D((x_next - x_t - velocity)^2), AWM's -M for x_next = noise, x_t = x0."""
    row = [float(name in ("a", "b", "k", "sigma")) for name in COLUMNS]
    with torch.inference_mode(False):  # remembered for training, too
        return Coefficients(torch.tensor(row, device=device))
