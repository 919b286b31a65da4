"""Rows of functions that stand inside of scripts: DanceGRPO's, G2RPO's and AWM's."""

from __future__ import annotations

from types import SimpleNamespace

import plain_steps
import torch
from drop_ins import LATENT, against
from plain_steps import mean_over_sample

from flowkern.compat.awm import compute_log_prob_awm
from flowkern.compat.dance_grpo import flux_step
from flowkern.compat.g2rpo import flow_grpo_step
from flowkern.compat.tempflow import sde_step_with_logprob_perstep
from flowkern.schedules import shifted_sigmas


def inputs(device, count=3):
    """Latents, and a grid."""
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.randn(LATENT, generator=generator, device=device) for _ in range(count)]
    return (*made, shifted_sigmas(16, 3.0).float())


def dance_training(device):
    v, *rest = inputs(device)
    name, given = "dance_grpo, replay + gradient", (v.requires_grad_(), *rest)
    return against(name, dance, plain_dance, given, leaf=0, loss=log_prob_alone)


def dance_replay(device):
    return against("dance_grpo, replay", dance, plain_dance, inputs(device))


def dance(v, x, x_next, sigmas):
    return flux_step(v, x, 0.3, sigmas, 4, x_next, True, True)


def plain_dance(v, x, x_next, sigmas):
    return plain_steps.dance(v, x, 0.3, sigmas, 4, x_next)


def log_prob_alone(made):
    return made[2].sum()


def g2rpo_training(device):
    v, *rest = inputs(device)

    def drop_in(v, x, x_next, sigmas):
        return flow_grpo_step(v, x, 0.7, sigmas, 4, x_next)

    def published(v, x, x_next, sigmas):
        return plain_steps.flow(v, x, 0.7, sigmas, 4, x_next)[:3]

    name, given = "g2rpo, replay + gradient", (v.requires_grad_(), *rest)
    return against(name, drop_in, published, given, leaf=0, loss=log_prob_alone)


def awm_training(device):
    """With a network that has its answer ready."""
    v, x0, noise, _ = inputs(device)
    t = torch.linspace(0.2, 0.9, len(v), device=device).view(-1, 1, 1, 1)
    config = SimpleNamespace(train=SimpleNamespace(cfg=False, ghuber_power=0.25))

    def drop_in(v, x0, noise, t):
        def network(**_):
            return (v,)

        given = (network, None, None, t, None, None, config, x0, x0, noise)
        return compute_log_prob_awm(*given, "ghuber")[0].sum()

    def published(v, x0, noise, t):
        error = (v.double() - (noise.double() - x0.double())) ** 2
        error = mean_over_sample(error) + 1e-10
        return (-(error**0.25 - 1e-10**0.25) * t.view(-1) / 0.25).sum()

    name = "awm, ghuber + gradient"
    return against(name, drop_in, published, (v.requires_grad_(), x0, noise, t), leaf=0)


def tempflow_branches(device):
    """Six of each of two samples, with their noise; the scheduler is no more than its grid."""
    v, x, _, sigmas = inputs(device)
    v, x = v[:2].contiguous(), x[:2].contiguous()
    scheduler = SimpleNamespace(sigmas=sigmas, index_for_timestep=int)
    generator, timestep = torch.Generator(device), torch.tensor([4])

    def drop_in(v, x, sigmas):
        seeded = generator.manual_seed(1)
        return sde_step_with_logprob_perstep(scheduler, v, timestep, x, generator=seeded)[:3]

    def published(v, x, sigmas):
        *_, mean, std = plain_steps.flow(v, x, 0.7, sigmas, 4, x)
        mean = mean.repeat_interleave(6, 0)
        noise = torch.randn(mean.shape, generator=generator.manual_seed(1), device=device)
        x_next = mean + std * noise
        return x_next, plain_steps.density(x_next, mean, std), mean

    return against("tempflow, six branches", drop_in, published, (v, x, sigmas), waits=True)


ROWS = [dance_training, dance_replay, g2rpo_training, awm_training, tempflow_branches]
