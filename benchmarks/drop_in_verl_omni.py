"""verl-omni's rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from drop_ins import LATENT, against

from flowkern.compat import verl_omni
from flowkern.schedules import sd3_sigmas

_LEVEL = 0.7


class _Scheduler(verl_omni._Step):
    """As much of verl-omni's class as a step asks for."""

    def __init__(self, device):
        self.sigmas = sd3_sigmas(10).to(device, torch.float32)
        self.timesteps = 1000 * self.sigmas[:-1]

    def index_for_timestep(self, timestep):
        return (self.timesteps == timestep).nonzero()[0].item()


def published(v, timestep, x, x_next, sigmas, timesteps):
    """A replay: the equations of Flow-GRPO, each operation a pass of its own."""
    index = [(timesteps == t).nonzero()[0].item() for t in timestep]
    s, n = (sigmas[i].view(-1, 1, 1, 1) for i in (index, [i + 1 for i in index]))
    dt = n - s
    g = _LEVEL * torch.sqrt(s / (1 - torch.where(s == 1, sigmas[1], s)))
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    std = g * torch.sqrt(-dt)
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean((1, 2, 3)).sum() + mean.square().mean()


def replay_with_gradient(device):
    generator = torch.Generator(device).manual_seed(0)
    v, x, x_next = torch.randn(3, *LATENT, generator=generator, device=device).unbind()
    scheduler = _Scheduler(device)

    def drop_in(v, timestep, x, x_next, *_):
        _, log_prob, mean, _ = scheduler.sample_previous_step(
            x, v, timestep, noise_level=_LEVEL, prev_sample=x_next
        )
        return log_prob.sum() + mean.square().mean()

    timestep = scheduler.timesteps[: LATENT[0]]
    given = (v.requires_grad_(), timestep, x, x_next, scheduler.sigmas, scheduler.timesteps)
    name = "verl-omni, replay + gradient of log-prob and mean"
    return against(name, drop_in, published, given, leaf=0, waits=True)


def published_nft(v, old, ref, x0, xt, t, r):
    """DiffusionNFT's loss, beta 0.5, and what is reported of it; weights in double precision."""

    def distance(velocity):
        predicted = xt - t * velocity
        with torch.no_grad():
            off = (predicted.double() - x0.double()).abs()
            weight = off.mean((1, 2, 3), keepdim=True).clip(min=1e-5).to(v.dtype)
        return ((predicted - x0) ** 2 / weight).mean((1, 2, 3))

    positive, negative = distance(0.5 * v + 0.5 * old), distance(1.5 * old - 0.5 * v)
    policy = (5 * (r * positive / 0.5 + (1 - r) * negative / 0.5)).mean()
    to_ref = ((v - ref) ** 2).mean()
    loss = policy + 1e-3 * to_ref
    with torch.no_grad():
        drift = ((v - old) ** 2).mean()
        for figure in (policy, positive.mean(), negative.mean(), to_ref, drift, r.mean(), loss):
            figure.item()
    return loss


def nft_with_gradient(device):
    generator = torch.Generator(device).manual_seed(0)
    v, old, ref, x0, noise = torch.randn(5, *LATENT, generator=generator, device=device).unbind()
    t = torch.linspace(0.95, 0.1, LATENT[0], device=device).view(-1, 1, 1, 1)
    options = {"mix_beta": 0.5, "adv_clip_max": 5.0, "ref_kl_coef": 1e-3}
    config = SimpleNamespace(diffusion_loss=SimpleNamespace(**options, adaptive_weight_min=1e-5))

    def drop_in(v, old, ref, x0, xt, t, r):
        given = {"forward_prediction": v, "old_prediction": old, "ref_forward_prediction": ref}
        given |= {"x0": x0, "xt": xt, "t_expanded": t, "reward_prob": r}
        return verl_omni._Loss.compute_loss(**given, config=config)[0]

    r = torch.linspace(0, 1, LATENT[0], device=device)
    given = (v.requires_grad_(), old, ref, x0, (1 - t) * x0 + t * noise, t, r)
    name = "verl-omni, NFT loss + metrics + gradient"
    return against(name, drop_in, published_nft, given, leaf=0, waits=True)


ROWS = [replay_with_gradient, nft_with_gradient]
