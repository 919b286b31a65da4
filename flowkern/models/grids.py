"""Grids of noise levels, as the pipelines' own schedulers have them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def dynamic_mu(scheduler: Any, patches: int) -> float:
    """The shift of a scheduler that shifts by the number of patches, as diffusers interpolates."""
    config = scheduler.config
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - least)
    return patches * slope + (low - slope * least)


def even(num_steps: int) -> list[float]:
    """The levels that most pipelines give their scheduler to shift: from 1 to 1 / num_steps."""
    return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()


def scheduler_sigmas(scheduler: Any, num_steps: int, **arguments: Any) -> Tensor:
    """The noise levels that a diffusers scheduler walks, (S + 1,) float64, the first exactly 1.

    arguments: of its set_timesteps. The scheduler is left as it is.
    Raises ValueError where they do not fall from 1 to 0, S times.
    """
    name = type(scheduler).__name__
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps, **arguments)
    if not hasattr(scheduler, "sigmas"):
        raise ValueError(f"path: the pipeline's scheduler, a {name}, has no sigmas, as a flow has")
    sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
    falls = bool((sigmas.diff() < 0).all()) and len(sigmas) == num_steps + 1
    if not falls or abs(float(sigmas[0]) - 1) > 1e-4 or sigmas[-1] != 0:
        levels = ", ".join(f"{level:.4g}" for level in sigmas[:4].tolist())
        raise ValueError(
            f"path: the pipeline's scheduler, a {name}, has the {len(sigmas)} levels {levels} ... "
            f"for {num_steps} steps; expected a flow grid, which falls from 1 to 0"
        )
    sigmas[0] = 1.0
    return sigmas
