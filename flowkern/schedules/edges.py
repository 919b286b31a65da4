"""The samplers of one step: each a formula for the coefficients of an edge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkern.checks import finite_number
from flowkern.schedules.coefficients import Coefficients, table_of
from flowkern.schedules.sigmas import edge_of, sigmas_of

KINDS = ("ode", "flow_sde", "dance_sde", "cps", "dpm_sde")


def edge_coefficients(
    sigma, sigma_next, kind: str, noise_level: float, sigma_max: float | None = None
) -> Coefficients:
    """Coefficients of the edge sigma -> sigma_next: floats give one edge, sequences (S,) S.

    kind: "ode" (Euler) | "flow_sde" (Flow-GRPO, arXiv 2505.05470)
        | "dance_sde" (DanceGRPO, arXiv 2505.07818) | "cps" (coefficients-preserving sampling)
        | "dpm_sde" (first-order SDE-DPM-Solver++, arXiv 2211.01095).
    noise_level: g = noise_level sqrt(sigma / (1 - sigma)) for flow_sde, the constant eta for
        dance_sde, the angle in units of pi / 2 for cps; "ode" and "dpm_sde" have none and take any
        value.
    sigma_max: stands for sigma in flow_sde's 1 / (1 - sigma) where sigma == 1: the second value of
        the grid. None: sigma_next.

    A sigma within 1e-5 of 1 counts as 1.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    s, n = edge_of("sigma", sigma), edge_of("sigma_next", sigma_next)
    if s.shape != n.shape:
        raise ValueError(
            f"sigma_next: expected the shape of sigma {tuple(s.shape)}, got {tuple(n.shape)}"
        )
    if not bool((n < s).all()):
        raise ValueError(
            f"sigma_next: expected values below sigma, got {n.tolist()} after {s.tolist()}"
        )
    noise_level = finite_number(
        "noise_level", noise_level, "a finite number >= 0", lambda x: x >= 0
    )
    if kind == "cps" and noise_level > 2:
        raise ValueError(f"noise_level: cps takes an angle in [0, 2], got {noise_level}")

    dt = n - s
    if kind == "ode":
        a, b, std = torch.ones_like(s), dt, torch.zeros_like(s)
    elif kind in ("flow_sde", "dance_sde"):
        g = torch.full_like(s, noise_level)
        if kind == "flow_sde":
            g = _flow_diffusion(s, n, noise_level, sigma_max)
        a = 1 + g**2 * dt / (2 * s)
        b = dt * (1 + g**2 * (1 - s) / (2 * s))
        std = g * torch.sqrt(-dt)
    elif kind == "cps":
        std = n * math.sin(noise_level * math.pi / 2)
        keep = n * abs(math.cos(noise_level * math.pi / 2))  # sqrt(sigma_next^2 - std^2)
        a = (1 - n) + keep
        b = -(1 - n) * s + keep * (1 - s)
    else:
        decay = exp_minus_h(s, n)
        weight = (1 - n) * (1 - decay**2)
        a = n / s * decay + weight
        b = -s * weight
        std = n * torch.sqrt(1 - decay**2)
    return table_of(a, b, std, s, tempered=kind == "cps")


def step_coefficients(sigmas, kind: str, noise_level: float) -> Coefficients:
    """Coefficients of all edges of a falling grid (S + 1,): S edges.

    Where sigma == 1, flow_sde uses the grid's second value; kind and noise_level as above.
    """
    sigmas = sigmas_of("sigmas", sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: expected shape (S + 1,) with S >= 1, got {tuple(sigmas.shape)}")
    return edge_coefficients(sigmas[:-1], sigmas[1:], kind, noise_level, sigma_max=float(sigmas[1]))


def _flow_diffusion(s: Tensor, n: Tensor, noise_level: float, sigma_max: float | None) -> Tensor:
    """Flow-GRPO's g = noise_level sqrt(sigma / (1 - sigma*)); sigma* = sigma but at sigma == 1."""
    second = n
    if sigma_max is not None:
        inside = "a number in [0, 1)"
        second = torch.full_like(
            s, finite_number("sigma_max", sigma_max, inside, lambda x: 0 <= x < 1)
        )
    return noise_level * torch.sqrt(s / (1 - torch.where(s == 1, second, s)))


def exp_minus_h(s: Tensor, n: Tensor) -> Tensor:
    """e^-h, h = lambda(sigma_next) - lambda(sigma), lambda = ln((1 - sigma) / sigma).

    Finite where lambda is not: 0 at sigma == 1 and at sigma_next == 0.
    """
    return (1 - s) * n / (s * (1 - n))
