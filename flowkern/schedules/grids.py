"""Sigma grids of the published samplers: (num_steps + 1,) float64 on the CPU, from 1 to 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkern.checks import finite_number, is_integer, shown_in_a_line


def sd3_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """The grid of diffusers' FlowMatchEuler for SD3.5: (num_steps + 1,) float64, from 1 to 0.

    The scheduler shifts sigma_min when it is made and again when its steps are set; so does this.
    """
    num_steps = _steps(num_steps)
    sigma_min = _shift(torch.tensor(1e-3, dtype=torch.float64, device="cpu"), shift)
    return _close(_shift(_linspace(1.0, float(sigma_min), num_steps), shift))


def flux_sigmas(num_steps: int, image_seq_len: int) -> Tensor:
    """The FLUX grid for `image_seq_len` packed image tokens, shifted by them: (num_steps + 1,)."""
    num_steps = _steps(num_steps)
    tokens = "a positive number of tokens, at most 2**20"
    image_seq_len = finite_number("image_seq_len", image_seq_len, tokens, lambda n: 0 < n <= 2**20)
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = image_seq_len * slope + 0.5 - 256 * slope
    u = _linspace(1.0, 1.0 / num_steps, num_steps)
    return _close(math.exp(mu) / (math.exp(mu) + (1 / u - 1)))


def shifted_sigmas(num_steps: int, shift: float) -> Tensor:
    """linspace(1, 0) shifted, as DanceGRPO, MixGRPO and G2RPO use it: (num_steps + 1,) float64."""
    num_steps = _steps(num_steps)
    return _shift(_linspace(1.0, 0.0, num_steps + 1), shift)


def _steps(num_steps: int) -> int:
    if not (is_integer(num_steps) and 1 <= num_steps <= 2**24):
        raise ValueError(
            f"num_steps: expected an integer from 1 to 2**24, got {shown_in_a_line(num_steps)}"
        )
    return int(num_steps)


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def _shift(u: Tensor, shift: float) -> Tensor:
    shift = finite_number("shift", shift, "a finite number > 0", lambda x: x > 0)
    return shift * u / (shift * u + (1 - u))  # exactly 1 at u == 1


def _close(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])
