"""X-GenGroup/Flow-Factory: its scheduler of flow matching, registered in place of its own.

    import flowkern.compat.flow_factory as flow_factory

    flow_factory.register()  # before the adapter is built

What differs: one kernel (with the mean where it is asked for) instead of some thirty operations, no
host synchronization for a step of known timesteps and levels, sigma within 1e-5 of 1 counts as 1,
and a finite log-probability (0) where the standard deviation is 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from numbers import Integral

import torch
from torch import Tensor

from flowkern.ops._common.arguments import check_latents
from flowkern.schedules import Coefficients, device_coefficients

from ._names import naming
from ._noise import Generators, randn_like
from ._peer import attribute, imported
from ._scheduler import step_index
from ._step import scored, scored_step

_PROJECT = "Flow-Factory"
_NAME = "FlowMatchEulerDiscreteSDEScheduler"
_KINDS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps", "ODE": None}
_FIELDS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")
_TUPLE = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")


class _Step:
    """Flow-Factory's scheduler with flowkern's step: drawn, or next_latents replayed.

    Args of `step`:
        noise_pred, latents, next_latents: (B, *D), any floating dtype; computed in float32.
        timestep: one of the scheduler's, () or (B,) or a float; an integer is a step's index. With
            timestep_next: any, in thousandths of sigma.
        noise_level: a number, or () or (B,). None: the scheduler's own on its steps of noise, 0
            elsewhere.
        return_kwargs: the fields to fill; a mean that is not asked for is not computed.
        dynamics_type: "Flow-SDE" | "Dance-SDE" | "CPS" | "ODE". None: the scheduler's own.
        sigma_max: for Flow-SDE where sigma is 1; None: the scheduler's second sigma.

    Returns:
        Flow-Factory's SDESchedulerOutput, or the tuple (next_latents, next_latents_mean,
        noise_pred, log_prob, std_dev_t, dt): (B, *D), (B,) or (B, 1, ...), float32. What is drawn
        goes through the dtype of latents (not so for ODE), and log_prob is of what it has become.
        log_prob and the mean are differentiable in noise_pred.
    """

    @naming(
        x_t="latents", velocity="noise_pred", x_next="next_latents", c_rows="timestep",
        sigma="timestep", sigma_next="timestep_next",
    )  # fmt: skip
    def step(
        self,
        noise_pred: Tensor,
        timestep: float | Tensor,
        latents: Tensor,
        next_latents: Tensor | None = None,
        timestep_next: float | Tensor | None = None,
        generator: Generators = None,
        noise_level: float | Tensor | None = None,
        compute_log_prob: bool = True,
        return_dict: bool = True,
        return_kwargs: Sequence[str] = _FIELDS,
        dynamics_type: str | None = None,
        sigma_max: float | Tensor | None = None,
    ):
        wanted = _asked(return_kwargs) if return_dict else _TUPLE
        dynamics = dynamics_type or self.dynamics_type
        if dynamics not in _KINDS:
            raise ValueError(f"dynamics_type: expected one of {tuple(_KINDS)}, got {dynamics!r}")
        sigma, sigma_next = _edge(self, timestep, timestep_next)
        if self.is_eval or dynamics == "ODE":
            noise_level = 0.0
        elif noise_level is None:
            noise_level = self.get_noise_level_for_sigma(sigma)
        if not (isinstance(sigma_max, Tensor) or sigma_max):
            sigma_max = self.sigmas[1]
        sigma, sigma_next = (_per_sample(x, latents.device) for x in (sigma, sigma_next))
        noise_level, sigma_max = (_number_or(x, latents.device) for x in (noise_level, sigma_max))
        dt = sigma_next - sigma
        if dynamics == "ODE":
            made = _euler(noise_pred, latents, next_latents, dt)
            std_dev_t = torch.zeros_like(dt)
        else:
            edges = device_coefficients(sigma, sigma_next, _KINDS[dynamics], noise_level, sigma_max)
            noise = None
            if next_latents is None:
                noise = randn_like(noise_pred.detach().float(), generator)
            step = scored_step if "next_latents_mean" in wanted else scored
            made = step(latents, noise_pred, edges, next_latents, noise, latents.dtype)
            std_dev_t = _returned_std(dynamics, edges, noise_level, dt)
        found = dict(zip(("next_latents", "log_prob", "next_latents_mean"), made, strict=False))
        if not compute_log_prob:
            found["log_prob"] = None
        found["noise_pred"] = noise_pred.float() if "noise_pred" in wanted else None
        for name, per_sample in (("std_dev_t", std_dev_t), ("dt", dt)):
            per_sample = per_sample.expand(len(latents))
            found[name] = per_sample.reshape(-1, *[1] * (latents.ndim - 1))
        found = {name: found[name] for name in wanted}
        return self._output_class(**found) if return_dict else tuple(found.values())


def _asked(return_kwargs: Sequence[str]) -> list[str]:
    for name in set(return_kwargs) - set(_FIELDS):
        warnings.warn(f"return_kwargs: a step has no {name!r}, it has {_FIELDS}", stacklevel=3)
    return [name for name in _FIELDS if name in return_kwargs]


def _edge(scheduler, timestep, timestep_next) -> tuple:
    """sigma and sigma_next, each a number or a tensor of one or of B."""
    if timestep_next is not None:
        return timestep / 1000, timestep_next / 1000
    if isinstance(timestep, Tensor) and timestep.ndim > 1:
        raise ValueError(
            f"timestep: expected a number or shape (B,), got {tuple(timestep.shape)}; where a "
            "model takes one for each token, give this the one they come from"
        )
    sigmas = scheduler.sigmas
    integer = isinstance(timestep, Integral) or (
        isinstance(timestep, Tensor) and not timestep.is_floating_point()
    )
    if integer:
        index = _position(timestep, len(sigmas) - 1)
        return sigmas[index : index + 1], sigmas[index + 1 : index + 2]
    index = step_index(scheduler, timestep, sigmas.device)
    return sigmas[index], sigmas[index + 1]


def _position(index: int | Tensor, steps: int) -> int:
    """An integer timestep counts steps, as in Flow-Factory; several would be a batch of them."""
    if isinstance(index, Tensor) and index.numel() != 1:
        raise ValueError(
            f"timestep: expected floating-point timesteps for each sample, got {index.dtype}"
        )
    if not 0 <= int(index) < steps:
        raise ValueError(f"timestep: an integer is a step from 0 to {steps - 1}, got {int(index)}")
    return int(index)


def _per_sample(value: float | Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """(1,) or (B,) float32."""
    if isinstance(value, (int, float)):
        return torch.full((1,), value, dtype=torch.float32, device=device)
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1)


def _number_or(value: float | Sequence[float] | Tensor, device: torch.device) -> float | Tensor:
    """A number as it is: it is looked at; else `_per_sample`, which is not."""
    return value if isinstance(value, (int, float)) else _per_sample(value, device)


def _euler(noise_pred: Tensor, latents: Tensor, next_latents: Tensor | None, dt: Tensor) -> tuple:
    """As `scored_step`, of a step without noise: what is drawn is the mean."""
    given = {} if next_latents is None else {"x_next": next_latents}
    check_latents({"x_t": latents, "velocity": noise_pred} | given)
    if len(dt) not in (1, len(latents)):
        raise ValueError(f"timestep: expected one or {len(latents)}, one per sample; got {len(dt)}")
    shape = (-1, *[1] * (latents.ndim - 1))
    mean = torch.addcmul(latents.float(), noise_pred.float(), dt.reshape(shape))
    drawn = mean if next_latents is None else next_latents.float()
    return drawn, mean.new_zeros(len(mean)), mean


def _returned_std(
    dynamics: str, edges: Coefficients, noise_level: float | Tensor, dt: Tensor
) -> Tensor:
    """std_dev_t as Flow-Factory returns it: g, eta, or the standard deviation of CPS."""
    if dynamics == "Dance-SDE":
        return _per_sample(noise_level, dt.device)
    return edges.std / torch.sqrt(-dt) if dynamics == "Flow-SDE" else edges.std


def register() -> None:
    """From here on Flow-Factory builds this scheduler wherever it would build its own."""
    __getattr__(_NAME)  # what is missing is said here, not when an adapter is built
    registry = imported("flow_factory.scheduler.registry", _PROJECT)
    attribute(registry, "register_scheduler", _PROJECT)(
        "FlowMatchEulerDiscreteScheduler", f"{__name__}.{_NAME}"
    )


def __getattr__(name: str) -> type:
    if name != _NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    theirs = imported("flow_factory.scheduler", _PROJECT)
    base, output = (attribute(theirs, each, _PROJECT) for each in (_NAME, "SDESchedulerOutput"))
    attribute(base, "get_noise_level_for_sigma", _PROJECT)  # what the step asks of it
    return _scheduler(base, output)


@cache
def _scheduler(theirs: type, output: type) -> type:
    class FlowMatchEulerDiscreteSDEScheduler(_Step, theirs):
        __doc__ = _Step.__doc__
        __qualname__ = _NAME
        _output_class = output

    return FlowMatchEulerDiscreteSDEScheduler
