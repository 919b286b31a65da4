"""Tencent-Hunyuan/UniRL: its SDE strategies, by one line of YAML.

    pipeline.strategy._target_: flowkern.compat.unirl.FlowSDEStrategy

stands where unirl.sde.kernels.FlowSDEStrategy stood, and CPSSDEStrategy and DanceSDEStrategy
likewise. Each is a subclass of UniRL's own, which its algorithms ask for, made when it is first
asked for; without UniRL it is a class of its own. What differs: one kernel where some twenty small
operations were, and a drawn prev_sample carries no gradient.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from flowkern.compat._names import STEP, naming
from flowkern.compat._noise import Generators, randn_like
from flowkern.compat._peer import attribute, imported
from flowkern.compat._step import scored_step
from flowkern.schedules import Coefficients, device_coefficients

_KINDS = {"FlowSDEStrategy": "flow_sde", "CPSSDEStrategy": "cps", "DanceSDEStrategy": "dance_sde"}
_NO_NOISE = 1e-7  # UniRL's own limit: below it a step is an ODE's, and has no log-probability
_NAMES = {**STEP, "velocity": "noise_pred", "c_rows": "sigma", "noise_level": "eta"}


class _FusedStep:
    """The transition of UniRL's strategies, by flowkern's kernels."""

    kind: str  # of flowkern.schedules

    @naming(**_NAMES)
    def denoise(
        self,
        noise_pred: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        eta: float = 1.0,
        prev_sample: Tensor | None = None,
        generator: Generators = None,
        sigma_max: float = 0.99,
        step_index: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One transition: drawn, or scored where prev_sample is given.

        Args:
            noise_pred, sample, prev_sample: (B, *D), any floating dtype; computed in float32.
            sigma, sigma_next: (), (1,), (B,) or (B, 1, ...).
            eta: the noise level; the angle of CPS. Below 1e-7 the step has no log-probability.
            generator: one, or one per sample; older versions of UniRL pass none.
            sigma_max: in place of sigma in 1 / (1 - sigma) where sigma is 1.
            step_index: not used.

        Returns:
            prev_sample (B, *D) float32, rounded to sample's dtype as it will be stored; log_prob
            (B,) of it, or None; prev_sample_mean (B, *D) float32. log_prob and prev_sample_mean are
            differentiable in noise_pred.
        """
        is_scored = eta >= _NO_NOISE
        edges = self._edges(sigma, sigma_next, eta, sigma_max).to(sample.device)
        stored, noise = sample.dtype if is_scored else torch.float32, None
        if prev_sample is not None:
            prev_sample = prev_sample.to(stored)
        else:  # without noise, too: the stream of random numbers is theirs
            like = noise_pred.new_empty((), dtype=torch.float32).expand_as(noise_pred)
            noise = randn_like(like, generator)
        prev_sample, log_prob, mean = scored_step(
            sample, noise_pred, edges, prev_sample, noise, stored
        )
        return prev_sample, log_prob if is_scored else None, mean

    @naming(**_NAMES)
    def step(
        self,
        noise_pred: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        eta: float = 1.0,
        prev_sample: Tensor | None = None,
        generator: Generators = None,
        sigma_max: float = 0.99,
        step_index: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `denoise`, without rounding and log-probability: prev_sample, its mean, and the
        standard deviation in sigma's shape.
        """
        edges = self._edges(sigma, sigma_next, eta, sigma_max).to(sample.device)
        noise = None if prev_sample is not None else randn_like(noise_pred, generator)
        prev_sample, _, mean = scored_step(sample, noise_pred, edges, prev_sample, noise)
        return prev_sample, mean, _like(edges.std, sigma, sigma_next)

    def transition_std(
        self, *, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: float = 0.99
    ) -> Tensor:
        """The standard deviation of the transition, in sigma's shape."""
        edges = self._edges(sigma, sigma_next, eta, sigma_max)
        return _like(edges.std, sigma, sigma_next)

    def _std_dev_t(
        self, *, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: float = 0.99
    ) -> Tensor:
        """The diffusion coefficient; of CPS the standard deviation, which has no sqrt(-dt)."""
        edges = self._edges(sigma, sigma_next, eta, sigma_max)
        g, s = edges.std.reshape(-1), edges.sigma.reshape(-1)  # 1 where sigma counts as 1
        if self.kind != "cps":
            g = g / (s - sigma_next.float().reshape(-1)).sqrt()
        return _like(g, sigma, sigma_next)

    def _edges(
        self, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: float
    ) -> Coefficients:
        """One edge for each sigma, or for all. A float64 grid counts as float32, as in UniRL."""
        sigma, sigma_next = (x.float().reshape(-1) for x in (sigma, sigma_next))
        return device_coefficients(sigma, sigma_next, self.kind, eta, sigma_max)


def _like(values: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One for each edge, in the shape of sigma, or of the sigma_next of several."""
    return values.reshape((sigma if sigma.numel() == values.numel() else sigma_next).shape)


class _NoPeer:
    """What UniRL's base class has besides the transition."""

    def __init__(self, *, config=None):
        del config  # the strategies of one step have no options

    def reset(self) -> None:
        """Nothing: a strategy of one step has no state."""

    def init_schedule(self, sigmas: Tensor) -> None:
        """Nothing: each call brings its sigmas."""


def __getattr__(name: str) -> type:
    if name not in _KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _strategy(name, _peer(name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_KINDS})


@cache
def _strategy(name: str, peer: type) -> type:
    return type(name, (_FusedStep, peer), {"kind": _KINDS[name], "__module__": __name__})


def _peer(name: str) -> type:
    """UniRL's class of that name, where there is a UniRL."""
    if "unirl" not in sys.modules and find_spec("unirl") is None:
        return _NoPeer
    return attribute(imported("unirl.sde.kernels", "UniRL"), name, "UniRL")
