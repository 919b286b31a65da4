"""Flow-Factory's rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from drop_ins import LATENT, against

from flowkern.compat import flow_factory
from flowkern.schedules import sd3_sigmas

_LEVEL = 0.7


class _Scheduler(flow_factory._Step):
    """As much of Flow-Factory's class as a step asks for."""

    dynamics_type, is_eval = "Flow-SDE", False
    _output_class = SimpleNamespace

    def __init__(self, device):
        self.sigmas = sd3_sigmas(10).to(device, torch.float32)
        self.timesteps = 1000 * self.sigmas[:-1]

    def index_for_timestep(self, timestep):
        return (self.timesteps == timestep).nonzero()[0].item()


def published(v, s, n, x, second, x_next=None, noise=None):
    """The equations of Flow-GRPO, an operation a pass: x_next, log_prob, mean."""
    dt = n - s
    g = _LEVEL * torch.sqrt(s / (1 - torch.where(s == 1, second, s)))
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    std = g * torch.sqrt(-dt)
    if x_next is None:
        x_next = mean + std * noise
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return x_next, log_prob.mean((1, 2, 3)), mean


def _inputs(device):
    """The scheduler; velocity, state and next state."""
    generator = torch.Generator(device).manual_seed(0)
    return _Scheduler(device), torch.randn(3, *LATENT, generator=generator, device=device).unbind()


def draw(device):
    """One timestep for all, as in a rollout; both draw the noise."""
    scheduler, (v, x, _) = _inputs(device)
    generator = torch.Generator(device)

    def drop_in(v, t, x, *_):
        generator.manual_seed(1)
        made = scheduler.step(v, t, x, noise_level=_LEVEL, generator=generator)
        return made.next_latents, made.log_prob, made.next_latents_mean

    def theirs(v, t, x, sigmas, timesteps):
        noise = torch.randn(v.shape, generator=generator.manual_seed(1), device=v.device)
        i = (timesteps == t).nonzero()[0].item()
        return published(v, sigmas[i], sigmas[i + 1], x, sigmas[1], noise=noise.to(v.dtype))

    given = (v, scheduler.timesteps[3], x, scheduler.sigmas, scheduler.timesteps)
    return against("Flow-Factory, draw", drop_in, theirs, given, waits=True)


def replay_with_gradient(device):
    """A time for each sample, and the next one, as in training; the log-probability alone."""
    scheduler, given = _training(device)

    def drop_in(v, t, t_next, x, x_next, _):
        asked = {"noise_level": _LEVEL, "return_kwargs": ["log_prob"]}
        return scheduler.step(v, t, x, x_next, t_next, **asked).log_prob

    def theirs(*given):
        return _replayed(*given)[0]

    name = "Flow-Factory, replay + gradient"
    return against(name, drop_in, theirs, given, leaf=0, loss=torch.sum)


def replay_with_gradient_of_both(device):
    """The mean has a gradient, too, as of a KL: here the cheapest that there is."""
    scheduler, given = _training(device)
    direction = torch.linspace(-1, 1, math.prod(LATENT), device=device)

    def drop_in(v, t, t_next, x, x_next, _):
        made = scheduler.step(v, t, x, x_next, t_next, noise_level=_LEVEL)
        return made.log_prob, made.next_latents_mean

    def loss(made):
        log_prob, mean = made
        return log_prob.sum() + torch.dot(mean.flatten(), direction.to(mean.dtype))

    name = "Flow-Factory, replay + gradient of log-prob and mean"
    return against(name, drop_in, _replayed, given, leaf=0, loss=loss)


def _training(device):
    scheduler, (v, x, x_next) = _inputs(device)
    steps = torch.arange(LATENT[0], device=device)
    times = scheduler.timesteps[steps], scheduler.timesteps[steps + 1]
    return scheduler, (v.requires_grad_(), *times, x, x_next, scheduler.sigmas[1])


def _replayed(v, t, t_next, x, x_next, second):
    s, n = (q.view(-1, 1, 1, 1) / 1000 for q in (t, t_next))
    return published(v, s, n, x, second, x_next)[1:]


ROWS = [draw, replay_with_gradient, replay_with_gradient_of_both]
