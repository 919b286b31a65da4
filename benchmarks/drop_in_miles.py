"""MILES's rows: a recorded transition scored, and its losses with their metrics."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from drop_ins import LATENT, against
from harness import Case, Contender
from rivals import compiled

from flowkern.compat.miles import SdeStepBackend, grpo_loss, nft_loss

SHAPE = (6, *LATENT[1:])
CLIP, BETA = 0.9, 0.04  # nothing is clipped: every sample has a gradient


# ---- the rivals: as published, each operation a pass of its own ----


def score(v, x, x_next, sigma, sigma_next, second):
    """The SDE step of MILES's backend."""
    s, n = (t.reshape(-1, 1, 1, 1) for t in (sigma, sigma_next))
    dt = n - s
    g = 0.7 * torch.sqrt(s / (1 - torch.where(s == 1, second, s)))
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    std = g * torch.sqrt(-dt)
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean((1, 2, 3)), mean, g


def grpo(v, v_ref, old, advantage, *transition):
    """MILES's loss, and the statistics that it reports."""
    log_prob, mean, g = score(v, *transition)
    ratio = torch.exp(log_prob - old)
    clipped = -advantage * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
    policy = torch.maximum(-advantage * ratio, clipped)
    loss, kl = policy.sum(), torch.zeros_like(policy)
    if v_ref is not None:
        mean_ref = score(v_ref, *transition)[1]
        kl = ((mean - mean_ref) ** 2).mean((1, 2, 3), keepdim=True) / (2 * g**2)
        loss = loss + BETA * kl.sum()
    away, log_ratio = (ratio - 1).abs(), log_prob - old
    statistics = (
        policy, kl, policy.abs(), advantage.abs(), away, 0.5 * log_ratio**2,
        (away > CLIP).float(), log_ratio.abs(),
    )  # fmt: skip
    return loss, [x.detach().sum() for x in statistics]


def nft(v, v_old, x0, x_t, t, advantage):
    """MILES's two branches on predictions of x0, with b = 1."""
    wide, r = t.reshape(-1, 1, 1, 1), (advantage / 5 / 2 + 0.5).clamp(0, 1)
    branches = []
    for towards in (v, 2 * v_old - v):
        prediction = x_t - wide * towards
        with torch.no_grad():
            weight = (prediction.double() - x0.double()).abs().mean((1, 2, 3), keepdim=True)
            weight = weight.clamp(min=1e-5).to(v.dtype)
        branches.append(((prediction - x0) ** 2 / weight).mean((1, 2, 3)))
    pair = 5 * (r * branches[0] + (1 - r) * branches[1])
    statistics = (pair, r, *branches, advantage, t, advantage.abs())
    return pair.sum(), [x.detach().sum() for x in statistics]


# ---- the rows ----

METRICS = SimpleNamespace(emit_mean=lambda name, total, count: None)  # both sides' sums, unread


def _inputs(device):
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda: torch.randn(SHAPE, generator=generator, device=device)  # noqa: E731
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10, device=device)
    scheduler.sigmas = scheduler.sigmas.to(device)
    sigmas = scheduler.sigmas
    at = torch.arange(SHAPE[0], device=device)
    return draw, scheduler, (sigmas[at], sigmas[at + 1])


def _times(scheduler):
    """Timesteps of each transition and of what follows it."""
    return scheduler.timesteps[: SHAPE[0]], scheduler.timesteps[1 : SHAPE[0] + 1]


def _looked_up(scheduler, timesteps, like):
    """Sigmas as MILES finds them, one after the other."""
    at = [scheduler.index_for_timestep(t) for t in timesteps]
    grid = scheduler.sigmas.to(like.dtype)
    return grid[at], grid[[i + 1 for i in at]], grid[1]


def replay_with_gradient(device) -> Case:
    """What is made of log-prob and mean is eager in every contender, as it is a script's own."""
    draw, scheduler, sigmas = _inputs(device)
    backend = SdeStepBackend(scheduler)
    times = _times(scheduler)
    arguments = (draw().requires_grad_(), draw(), draw())

    def loss(log_prob, mean):
        return log_prob.sum() + mean.square().mean()

    def drop_in(v, x, x_next):
        found = backend.sde_step_logprob(v, *times, x, prev_sample=x_next, noise_level=0.7)
        return loss(found.log_prob, found.prev_mean)

    def theirs(v, x, x_next):
        return loss(*score(v, x, x_next, *_looked_up(scheduler, times[0], x))[:2])

    name = "MILES, replay + gradient of log-prob and mean"
    case = against(name, drop_in, theirs, arguments, leaf=0, waits=True)
    code = compiled(score, *arguments, *sigmas, scheduler.sigmas[1])
    gradient = lambda: torch.autograd.grad(loss(*code()[:2]), arguments[0])  # noqa: E731
    case.contenders.append(Contender("torch.compile", gradient))
    return case


def loss(device) -> Case:
    return _grpo(device, "MILES, loss + gradient", has_kl=False)


def loss_with_kl(device) -> Case:
    return _grpo(device, "MILES, loss with KL + gradient", has_kl=True)


def _grpo(device, name: str, has_kl: bool) -> Case:
    draw, scheduler, sigmas = _inputs(device)
    v, x, x_next = draw().requires_grad_(), draw(), draw()
    v_ref = v.detach() + 0.01 * draw() if has_kl else None
    old = score(v.detach(), x, x_next, *sigmas, scheduler.sigmas[1])[0]
    old = old + torch.linspace(-0.1, 0.1, SHAPE[0], device=device)
    args = {"diffusion_clip_range": CLIP, "diffusion_noise_level": 0.7}
    ctx = SimpleNamespace(
        args=SimpleNamespace(diffusion_kl_beta=BETA if has_kl else 0.0, **args),
        sde_backend=SdeStepBackend(scheduler),
        models={"transformer": None},
    )
    advantage = torch.linspace(-1, 1, SHAPE[0], device=device)
    times, next_times = _times(scheduler)
    batch = [{}] * SHAPE[0]

    def drop_in(v, v_ref, old, advantage, x, x_next):
        extras = {"next_latents": x_next, "next_timesteps": next_times, "log_prob_old": old}
        prepared = SimpleNamespace(latents=x, timesteps=times, advantage=advantage, extras=extras)
        return grpo_loss(ctx, batch, prepared, new_pred=v, ref_pred=v_ref, metrics=METRICS)

    def theirs(v, v_ref, old, advantage, x, x_next, *sigmas):
        sigmas = sigmas or _looked_up(scheduler, times, x)
        return grpo(v, v_ref, old, advantage, x, x_next, *sigmas)[0]

    given = (v, v_ref, old, advantage, x, x_next)
    return _with_compiled(name, drop_in, theirs, given, (*sigmas, scheduler.sigmas[1]))


def nft_with_gradient(device) -> Case:
    draw, _, (t, _) = _inputs(device)
    v, v_old, x0 = draw().requires_grad_(), draw(), draw()
    x_t = torch.lerp(x0, draw(), t.reshape(-1, 1, 1, 1))
    args = {"diffusion_nft_beta": 1.0, "diffusion_nft_adaptive_weight": True}
    ctx = SimpleNamespace(args=SimpleNamespace(diffusion_adv_clip_max=5.0, **args))
    batch = [{"nft_num_timesteps": 9}] * SHAPE[0]

    def drop_in(v, v_old, x0, x_t, t, advantage):
        prepared = SimpleNamespace(latents=x_t, timesteps=t, advantage=advantage, extras={"x0": x0})
        return nft_loss(ctx, batch, prepared, new_pred=v, ref_pred=v_old, metrics=METRICS)

    given = (v, v_old, x0, x_t, t, torch.linspace(-5, 5, SHAPE[0], device=device))
    name = "MILES, NFT loss + gradient"
    return _with_compiled(name, drop_in, lambda *g: nft(*g)[0], given, ())


def _with_compiled(name, drop_in, theirs, arguments: tuple, sigmas: tuple) -> Case:
    """Compiled is what follows the look-up of sigmas, which reads each timestep on the host."""
    case = against(name, drop_in, theirs, arguments, leaf=0, waits=True)
    run = compiled(theirs, *arguments, *sigmas)
    gradient = lambda: torch.autograd.grad(run(), arguments[0])  # noqa: E731
    case.contenders.append(Contender("torch.compile", gradient))
    return case


ROWS = [loss, loss_with_kl, replay_with_gradient, nft_with_gradient]
