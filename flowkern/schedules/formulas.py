"""The samplers of one step: a, b and std of an edge, in the dtype and on the device of sigma.

`triton_impl.py` writes them once more, for CUDA devices. Nothing here reads a value on the host.

s = sigma, n = sigma_next, dt = n - s. An Euler step of an SDE with diffusion g moves by the score,

    h = g^2 dt / (2 s),   a = 1 + h,   b = dt + h (1 - s),   std = g sqrt(-dt) = sqrt(-2 s h)

and the samplers that preserve coefficients keep (1 - n) of the predicted image and share n of the
predicted noise, and draw the rest of it anew,

    keep = share n,   a = 1 - n + keep,   b = keep (1 - s) - (1 - n) s,   std = sqrt(n^2 - keep^2)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

KINDS = ("ode", "flow_sde", "dance_sde", "cps", "dpm_sde")
TEMPERED = ("cps",)
"""Their published log-probability is k = 1, c = 0."""
UNLEVELLED = ("ode", "dpm_sde")
"""Those without a noise level."""
NEAR_ONE = 1e-5  # a sigma as near to 1 counts as 1: rounded grids begin at .999999


def rest_of(s: Tensor) -> Tensor:
    """1 - sigma, and 0 where sigma is near 1."""
    return hardshrink(1 - s, NEAR_ONE)


def at_most_one(s: Tensor) -> Tensor:
    """Sigma, and 1 where it is near 1."""
    return s.masked_fill(rest_of(s) == 0, 1.0)


def step(
    kind: str,
    s: Tensor,
    rest: Tensor,
    n: Tensor,
    level: float | Tensor,
    second: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, std) of `kind`, of the shape of s. rest: `rest_of(s)`, of a sigma that is at most 1.

    second: stands for sigma in flow_sde's 1 / (1 - sigma) where that is 1; None: sigma_next.
    """
    dt = n - s
    if kind == "ode":
        return torch.ones_like(s), dt, torch.zeros_like(s)
    if kind in ("flow_sde", "dance_sde"):
        # g^2 = level^2 s / (1 - s), or level^2
        over = s if kind == "dance_sde" else _but_at_one(rest, n, second)
        h = dt * (0.5 * level * level) / over
        return 1 + h, dt + h * rest, torch.sqrt(h * s * -2)
    image = 1 - n
    if kind == "cps":
        sin, cos = _sin_cos(level * (math.pi / 2))
        keep, std = n * abs(cos), n * sin
    else:
        share = exp_minus_h(s, n, rest, image)
        keep, std = n * share, n * torch.sqrt(1 - share * share)
    return image + keep, keep * rest - image * s, std


def _but_at_one(rest: Tensor, n: Tensor, second: float | Tensor | None) -> Tensor:
    """1 - sigma, and 1 - second where that is 0."""
    second = n if second is None else second
    return torch.where(rest.logical_not(), 1 - second, rest)


def _sin_cos(angle: float | Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    if isinstance(angle, Tensor):
        return torch.sin(angle), torch.cos(angle)
    return math.sin(angle), math.cos(angle)


def exp_minus_h(s: Tensor, n: Tensor, rest: Tensor, image: Tensor) -> Tensor:
    """e^-h, h = lambda(sigma_next) - lambda(sigma), lambda = ln((1 - sigma) / sigma).

    rest: 1 - s; image: 1 - n. Finite where lambda is not: 0 at sigma == 1 and at sigma_next == 0.
    """
    return rest * n / (s * image)
