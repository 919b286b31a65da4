"""flow_grpo's rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from drop_ins import LATENT, against

from flowkern.compat.flow_grpo import sde_step_with_logprob, wan_sde_step_with_logprob
from flowkern.schedules import sd3_sigmas


def published(v, timestep, x, x_next, sigmas, timesteps):
    """A replay: the equations of Flow-GRPO, each operation a pass of its own."""
    index = [(timesteps == t).nonzero()[0].item() for t in timestep]
    wide = (-1, *[1] * (x.ndim - 1))
    s, n = sigmas[index].view(wide), sigmas[[i + 1 for i in index]].view(wide)
    dt = n - s
    g = 0.7 * torch.sqrt(s / (1 - torch.where(s == 1, sigmas[1], s)))
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    std = g * torch.sqrt(-dt)
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean((1, 2, 3)), mean


def _inputs(device):
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda: torch.randn(LATENT, generator=generator, device=device)  # noqa: E731
    sigmas = sd3_sigmas(10).to(device, torch.float32)
    timesteps = 1000 * sigmas[:-1]
    index = torch.arange(LATENT[0], device=device)
    find = lambda t: int((timesteps == t).nonzero()[0])  # noqa: E731
    scheduler = SimpleNamespace(sigmas=sigmas, timesteps=timesteps, index_for_timestep=find)
    return scheduler, (draw(), timesteps[index], draw(), draw(), sigmas, timesteps)


def replay(device):
    scheduler, arguments = _inputs(device)

    def drop_in(v, timestep, x, x_next, *_):
        return sde_step_with_logprob(scheduler, v, timestep, x, 0.7, prev_sample=x_next)[1:3]

    return against("flow_grpo, replay", drop_in, published, arguments, waits=True)


def replay_with_gradient(device):
    scheduler, (v, *rest) = _inputs(device)

    def drop_in(v, timestep, x, x_next, *_):
        return sde_step_with_logprob(scheduler, v, timestep, x, 0.7, prev_sample=x_next)[1:3]

    def loss(made):
        log_prob, mean = made
        return log_prob.sum() + mean.square().mean()

    name, given = "flow_grpo, replay + gradient of log-prob and mean", (v.requires_grad_(), *rest)
    return against(name, drop_in, published, given, leaf=0, waits=True, loss=loss)


def published_wan(v, timestep, x, x_next, sigmas, timesteps):
    index = [(timesteps == t).nonzero()[0].item() for t in timestep]
    wide = (-1, *[1] * (x.ndim - 1))
    s, n = sigmas[index].view(wide), sigmas[[i + 1 for i in index]].view(wide)
    lowest, highest, dt = sigmas[-1].item(), sigmas[1].item(), n - s
    g = lowest + (highest - lowest) * s
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    std = g * torch.sqrt(-dt)
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean((1, 2, 3)), mean


def wan_replay(device):
    scheduler, arguments = _inputs(device)

    def drop_in(v, timestep, x, x_next, *_):
        return wan_sde_step_with_logprob(scheduler, v, timestep, x, x_next)[1:3]

    return against("flow_grpo, Wan, replay", drop_in, published_wan, arguments, waits=True)


ROWS = [replay, replay_with_gradient, wan_replay]
