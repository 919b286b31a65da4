"""Edges of one step from numbers: looked at, and computed in float64 on the CPU."""

from __future__ import annotations

from flowkern.checks import shown
from flowkern.schedules.coefficients import Coefficients, checked, stacked
from flowkern.schedules.formulas import KINDS, TEMPERED, UNLEVELLED, step
from flowkern.schedules.own import Sampler, own_edges, sampler_of
from flowkern.schedules.sigmas import edge_of, level_of, second_of, sigmas_of


def edge_coefficients(
    sigma, sigma_next, kind: str | Sampler, noise_level: float, sigma_max: float | None = None
) -> Coefficients:
    """Coefficients of the edge sigma -> sigma_next: floats give one edge, sequences (S,) S.

    kind: "ode" (Euler) | "flow_sde" (Flow-GRPO, arXiv 2505.05470)
        | "dance_sde" (DanceGRPO, arXiv 2505.07818) | "cps" (coefficients-preserving sampling)
        | "dpm_sde" (first-order SDE-DPM-Solver++, arXiv 2211.01095), or one's own: a function
        (sigma, sigma_next, noise_level) -> (a, b, std), or (a, b, std, k, c), of numbers, by itself
        or as "module:function"; k and c are a Gaussian's where it does not give them.
    noise_level: g = noise_level sqrt(sigma / (1 - sigma)) for flow_sde, the constant eta for
        dance_sde, the angle in units of pi / 2 for cps; "ode" and "dpm_sde" have none and take any
        value.
    sigma_max: stands for sigma in flow_sde's 1 / (1 - sigma) where sigma == 1: the second value of
        the grid. None: sigma_next.

    A sigma within 1e-5 of 1 counts as 1. A tensor on another device than the CPU is refused, as
    reading it would wait for that: `device_coefficients` takes it.
    """
    is_own = not (isinstance(kind, str) and kind in KINDS)
    if is_own:
        sampler_of(kind)  # what is wrong with it before what is wrong with an edge
    s, n = edge_of("sigma", sigma), edge_of("sigma_next", sigma_next)
    if s.shape != n.shape:
        raise ValueError(
            f"sigma_next: expected the shape of sigma {tuple(s.shape)}, got {tuple(n.shape)}"
        )
    if not bool((n < s).all()):
        raise ValueError(
            f"sigma_next: expected values below sigma, got {shown(n.tolist())} after "
            f"{shown(s.tolist())}"
        )
    noise_level, sigma_max = level_of(kind, noise_level), second_of(sigma_max)
    if is_own:
        return own_edges(kind, s, n, noise_level)
    table = stacked(*step(kind, s, 1 - s, n, noise_level, sigma_max), s, kind in TEMPERED)
    return checked(table, name="sigma" if kind in UNLEVELLED else "noise_level")


def step_coefficients(sigmas, kind: str | Sampler, noise_level: float) -> Coefficients:
    """Coefficients of all edges of a falling grid (S + 1,): S edges.

    Where sigma == 1, flow_sde uses the grid's second value; kind and noise_level as above.
    """
    sigmas = sigmas_of("sigmas", sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: expected shape (S + 1,) with S >= 1, got {tuple(sigmas.shape)}")
    return edge_coefficients(sigmas[:-1], sigmas[1:], kind, noise_level, sigma_max=float(sigmas[1]))
