"""The peers' steps as their papers and scripts define them, written out in float64.

Each returns (x_next, x0, log_prob, mean, std) for a step s -> n of a grid; x_next as given, or
drawn with `noise`.
"""

import math

import torch


def wide(values, x):
    """One number for each sample, or for all, against latents."""
    values = torch.as_tensor(values).double()
    return values if values.ndim == 0 else values.reshape(-1, *[1] * (x.ndim - 1))


def gaussian(x_next, mean, std):
    density = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def squares(scale, x_next, mean, std):
    """A score without its normalizer."""
    return -((x_next - mean) ** 2 * scale).flatten(1).mean(1)


def step(s, n, velocity, x, mean, std, x_next=None, noise=None, score=gaussian):
    x_next = (mean + std * noise.double()).detach() if x_next is None else x_next.double()
    return x_next, x.double() - s * velocity, score(x_next, mean, std), mean, std


def with_g(s, n, velocity, x, g, **how):
    """Euler's step with the drift that a diffusion coefficient g needs."""
    x, velocity, dt = x.double(), velocity.double(), n - s
    noise_seen = x + (1 - s) * velocity
    mean = x + dt * velocity + dt * g**2 / (2 * s) * noise_seen
    return step(s, n, velocity, x, mean, g * torch.sqrt(-dt), **how)


def flow(s, n, velocity, x, level, sigma_max, **how):
    g = level * torch.sqrt(s / (1 - torch.where(s == 1, wide(sigma_max, x), s)))
    return with_g(s, n, velocity, x, g, **how)


def dance(s, n, velocity, x, eta, **how):
    return with_g(s, n, velocity, x, torch.full_like(s, eta), **how)


def euler_with_noise(s, n, velocity, x, eta, **how):
    """DanceGRPO's without its score: Euler's mean, and noise."""
    x, velocity = x.double(), velocity.double()
    return step(s, n, velocity, x, x + (n - s) * velocity, eta * torch.sqrt(s - n), **how)


def of_x0_and_noise(s, n, velocity, x, std, **how):
    """Where x0 and the noise that the velocity says are put together anew, with noise of std."""
    x, velocity = x.double(), velocity.double()
    x0, noise_seen = x - s * velocity, x + (1 - s) * velocity
    mean = (1 - n) * x0 + torch.sqrt(n**2 - std**2) * noise_seen
    return step(s, n, velocity, x, mean, std, **how)


def cps(s, n, velocity, x, level, **how):
    how = {"score": lambda *of: squares(1.0, *of)} | how
    return of_x0_and_noise(s, n, velocity, x, n * math.sin(level * math.pi / 2), **how)


def ddim(s, n, velocity, x, eta, **how):
    decay = n * (1 - s) / (s * (1 - n))  # e^-h
    return of_x0_and_noise(s, n, velocity, x, eta * n * torch.sqrt(1 - decay**2), **how)


def dpm(sigmas, x, x0s, order, variant="midpoint", noise=None):
    """DPM-Solver++ in its log-SNR, from x0 predictions, the latest first: sigmas[order - 1] to the
    next. With noise its SDE: (x_next, log_prob); else (x_next, None)."""
    alphas = [1 - s for s in sigmas]
    lam = [torch.log(a) - torch.log(s) for a, s in zip(alphas, sigmas, strict=True)]
    h, (s, n, alpha) = lam[-1] - lam[-2], (sigmas[-2], sigmas[-1], alphas[-1])
    reach = 2 * h if noise is not None else h  # how far x0 decays
    first = alpha * (1 - torch.exp(-reach))
    mean = n / s * (torch.exp(-h) if noise is not None else 1) * x.double() + first * x0s[0]
    if order > 1:
        r0 = (lam[-2] - lam[-3]) / h
        slope = (x0s[0] - x0s[1]) / r0
        second = alpha * ((torch.exp(-h) - 1) / h + 1)
        if order == 2:
            mean = mean + (0.5 * first if variant == "midpoint" else second) * slope
        else:
            r1 = (lam[-3] - lam[-4]) / h
            bend = (slope - (x0s[1] - x0s[2]) / r1) / (r0 + r1)
            third = alpha * ((torch.exp(-h) - 1 + h) / h**2 - 0.5)
            mean = mean + second * (slope + r0 * bend) - third * bend
    if noise is None:
        return mean, None
    std = n * torch.sqrt(1 - torch.exp(-reach))
    x_next = mean + std * noise.double()
    return x_next, gaussian(x_next, mean, std)
