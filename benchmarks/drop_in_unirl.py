"""UniRL's rows."""

from __future__ import annotations

import math

import torch
from drop_ins import LATENT, against
from harness import Contender
from rivals import compiled

from flowkern.compat.unirl import FlowSDEStrategy
from flowkern.schedules import sd3_sigmas

STEP = 3


def published(v, x, sigma, sigma_next, x_next=None, noise=None):
    """Flow-SDE as UniRL's strategy has it, each operation a pass of its own."""
    s, n = (t.reshape(1, 1, 1, 1) for t in (sigma, sigma_next))
    dt = n - s
    g = 0.7 * torch.sqrt(s / (1 - torch.where(s == 1, 0.99, s)))
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    if x_next is None:
        x_next = mean + g * torch.sqrt(-dt) * noise
    std = g * torch.sqrt(-dt)
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return x_next, log_prob.mean((1, 2, 3)), mean


def _inputs(device):
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda: torch.randn(LATENT, generator=generator, device=device)  # noqa: E731
    sigmas = sd3_sigmas(10)[STEP : STEP + 2].to(device, torch.float32)
    return generator, (draw(), draw(), *sigmas, draw())


def draw(device):
    """The noise is drawn, too; the compiled formula is given it, drawn into the same memory."""
    generator, (v, x, sigma, sigma_next, noise) = _inputs(device)
    strategy = FlowSDEStrategy()

    def drop_in(*given):
        return strategy.denoise(*given, eta=0.7, generator=generator.manual_seed(1))

    def theirs(v, *given):
        noise = torch.randn(LATENT, generator=generator.manual_seed(1), device=device)
        return published(v, *given, noise=noise)

    arguments = (v, x, sigma, sigma_next)
    case = against("UniRL, draw with its noise", drop_in, theirs, arguments, waits=True)
    code = compiled(published, *arguments, None, noise)

    def compiled_draw():
        noise.normal_(generator=generator.manual_seed(1))
        return code()

    case.contenders.append(Contender("torch.compile", compiled_draw))
    return case


def replay_with_gradient(device):
    """What is made of log-prob and mean is eager in every contender, as it is a script's own."""
    v, *rest = _inputs(device)[1]
    arguments, strategy = (v.requires_grad_(), *rest), FlowSDEStrategy()

    def loss(of):
        _, log_prob, mean = of
        return log_prob.sum() + mean.square().mean()

    def drop_in(*given):
        return loss(strategy.denoise(*given[:4], eta=0.7, prev_sample=given[4]))

    name = "UniRL, replay + gradient of log-prob and mean"
    case = against(
        name, drop_in, lambda *given: loss(published(*given)), arguments, leaf=0, waits=True
    )
    code = compiled(published, *arguments)
    gradient = lambda: torch.autograd.grad(loss(code()), v)  # noqa: E731
    case.contenders.append(Contender("torch.compile", gradient))
    return case


ROWS = [draw, replay_with_gradient]
