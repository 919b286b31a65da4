"""Steps of a grid and an index as scripts have them: each operation a pass of its own."""

from __future__ import annotations

import math

import torch


def mean_over_sample(x):
    return x.mean(tuple(range(1, x.ndim)))


def density(x_next, mean, std):
    squares = (x_next.detach() - mean) ** 2
    log_prob = -squares / (2 * std**2) - torch.log(std)
    return mean_over_sample(log_prob - 0.5 * math.log(2 * math.pi))


def flow(v, x, eta, sigmas, index, x_next=None, noise=None):
    """MixGRPO's, G2RPO's and DiffusionNFT's flow_grpo_step: x_next, x0, log_prob, mean, std."""
    s, n = sigmas[index], sigmas[index + 1]
    dt, x0 = n - s, x - s * v
    g = torch.sqrt(s / (1 - torch.where(s == 1, sigmas[1], s))) * eta
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    std = g * torch.sqrt(-dt)
    x_next = mean + std * noise if x_next is None else x_next
    return x_next, x0, density(x_next, mean, std), mean, std


def dance(v, x, eta, sigmas, index, x_next=None, noise=None):
    """DanceGRPO's flux_step with its score: x_next, x0, log_prob."""
    s, n = sigmas[index], sigmas[index + 1]
    mean, x0 = x + (n - s) * v, x - s * v
    std = eta * torch.sqrt(s - n)
    score = -(x - x0 * (1 - s)) / s**2
    mean = mean - 0.5 * eta**2 * score * (n - s)
    x_next = mean + noise * std if x_next is None else x_next
    return x_next, x0, density(x_next, mean, std)


def second_order(v, x, x0_before, sigmas, index):
    """DPM-Solver++ 2, midpoint, of MixGRPO and DiffusionNFT: x_next, x0."""
    before, s, n = sigmas[index - 1], sigmas[index], sigmas[index + 1]
    log_snr = [torch.log(1 - t) - torch.log(t) for t in (before, s, n)]
    h0, h = log_snr[1] - log_snr[0], log_snr[2] - log_snr[1]
    x0 = x - s * v
    slope, reach = (x0 - x0_before) / (h0 / h), (1 - n) * (torch.exp(-h) - 1)
    return n / s * x - reach * x0 - 0.5 * reach * slope, x0
