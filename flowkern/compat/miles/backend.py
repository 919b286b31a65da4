"""MILES's step backend: recorded transitions, scored."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from flowkern.compat._grid import grid_of, level_of, per_sample
from flowkern.compat._names import STEP, naming
from flowkern.compat._scheduler import step_index
from flowkern.compat._step import scored_step
from flowkern.schedules import Coefficients, device_coefficients, step_coefficients


class SdeStepScore(NamedTuple):
    """A recorded transition, scored."""

    prev_sample: Tensor  # (B, *D) float32
    log_prob: Tensor  # (B,), differentiable in the velocity, as prev_mean is
    prev_mean: Tensor  # (B, *D) float32
    std_dev_t: Tensor  # (B, 1, ...): the diffusion coefficient; of cps the standard deviation
    noise_std: Tensor  # (B, 1, ...): the standard deviation


class Transition(NamedTuple):
    """The steps of a micro-batch."""

    edges: Coefficients  # one for each sample, or one for all
    std: Tensor  # (B,)
    g: Tensor  # (B,): std_dev_t

    def to(self, device: torch.device) -> Transition:
        """Where the latents are: sigmas may be numbers on the CPU."""
        return Transition(*(part.to(device) for part in self))


class SdeStepBackend:
    """MILES's step backend; kind: "flow_sde" | "cps".

    Both stored contracts are served: timesteps and next_timesteps of a scheduler, or sigmas and
    next_sigmas with sigma_max. Without a scheduler, and with "cps", a sigma is its timestep divided
    by sde_timestep_divisor.
    """

    kind = "flow_sde"

    def __init__(
        self, scheduler=None, *, sde_timestep_divisor: float = 1.0, kind: str | None = None
    ):
        self.scheduler = scheduler
        self.sde_timestep_divisor = float(sde_timestep_divisor)
        if kind is not None:
            self.kind = kind
        if self.kind not in ("flow_sde", "cps"):
            raise ValueError(f"kind: expected 'flow_sde' or 'cps', got {self.kind!r}")

    def resolve_sigmas(
        self, timesteps: Tensor, next_timesteps: Tensor, *, ndim: int
    ) -> tuple[Tensor, Tensor]:
        """sigma and the next one of each transition, (B, 1, ...) of `ndim` dimensions.

        With a scheduler the next sigma is its neighbour, whatever next_timesteps says.
        """
        if self._has_grid:
            grid = self.scheduler.sigmas
            at = step_index(self.scheduler, timesteps, grid.device)
            pair = (grid[at].to(timesteps.device), grid[at + 1].to(timesteps.device))
        else:
            pair = (t.float() / self.sde_timestep_divisor for t in (timesteps, next_timesteps))
        sigma, sigma_next = (x.reshape(-1, *[1] * (ndim - 1)) for x in pair)
        return sigma, sigma_next

    @naming(**STEP, c_rows="sigma", sigma_next="sigma_prev")
    def prev_sample_mean_and_std(
        self,
        model_output: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_prev: Tensor,
        *,
        noise_level: float | Tensor,
        sigma_max: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean (B, *D), differentiable in model_output; noise_std and std_dev_t (B, 1, ...)."""
        of = self.between(sigma, sigma_prev, noise_level, sigma_max).to(sample.device)
        mean = scored_step(sample, model_output, of.edges, sample)[2]
        return mean, _wide(of.std, sample.ndim), _wide(of.g, sample.ndim)

    def log_prob(self, prev_sample: Tensor, prev_mean: Tensor, noise_std: Tensor) -> Tensor:
        """(B,), a mean over D; of cps without its constants. Differentiable in prev_mean."""
        away = prev_sample.detach().float() - prev_mean.float()
        squared = away.square().flatten(1).mean(1)
        if self.kind == "cps":
            return -squared
        std = noise_std.reshape(-1)
        is_still = std == 0  # without noise: 0, as the kernel has it
        std = std.masked_fill(is_still, 1.0)
        normal = -squared / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
        return normal.masked_fill(is_still, 0.0)

    def expected_log_prob(
        self, rollout_prev_mean: Tensor, prev_mean: Tensor, noise_std: Tensor
    ) -> Tensor:
        """(B,): the log-probability of the rollout's mean, whose gradient is that of the expected
        one over the rollout's steps; their values differ by a constant."""
        return self.log_prob(rollout_prev_mean, prev_mean, noise_std)

    @naming(**STEP, c_rows="timesteps", timestep="timesteps")
    def sde_step_logprob(
        self,
        model_output: Tensor,
        timesteps: Tensor | None = None,
        next_timesteps: Tensor | None = None,
        sample: Tensor | None = None,
        *,
        prev_sample: Tensor,
        noise_level: float | Tensor,
        sigmas: Tensor | None = None,
        next_sigmas: Tensor | None = None,
        sigma_max: float | Tensor | None = None,
    ) -> SdeStepScore | tuple[Tensor, ...]:
        """Scores recorded transitions.

        Args:
            model_output, sample, prev_sample: (B, *D) velocity, latent and the next latent, any
                floating dtype; computed in float32.
            timesteps, next_timesteps: (B,). Or else sigmas and next_sigmas, (B,) or (B, 1, ...):
                by name, and then sample is the second argument; or, with sigma_max, in their place.

        Returns:
            SdeStepScore; its first four values where sigmas are given, or where the MILES that is
            running takes four.
        """
        if sigmas is not None and sample is None:
            sample = timesteps
        elif sigmas is None and sigma_max is not None:
            sigmas, next_sigmas = timesteps, next_timesteps
        given = {"sample": sample, "prev_sample": prev_sample, "next_sigmas": next_sigmas}
        for name, x in given.items():
            if x is None and (name != "next_sigmas" or sigmas is not None):
                raise ValueError(f"{name}: expected a tensor, got None")
        has_sigmas, ndim = sigmas is not None, sample.ndim
        if self.has_own_step:
            pair = (sigmas, next_sigmas)
            if not has_sigmas:
                pair = self.resolve_sigmas(timesteps, next_timesteps, ndim=ndim)
            score = self._by_layers(
                (model_output, sample, prev_sample), pair, noise_level, sigma_max
            )
        else:
            if has_sigmas:
                of = self.between(sigmas, next_sigmas, noise_level, sigma_max).to(sample.device)
            else:
                of = self.transition(timesteps, next_timesteps, noise_level, sample.device)
            scored = scored_step(sample, model_output, of.edges, prev_sample)
            score = SdeStepScore(*scored, _wide(of.g, ndim), _wide(of.std, ndim))
        return score[:4] if has_sigmas or _takes_four() else score

    @property
    def has_own_step(self) -> bool:
        """Does a class derived from this one have another mean, deviation or log-probability?"""
        return self._overrides("prev_sample_mean_and_std") or self._overrides("log_prob")

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(SdeStepBackend, name)

    def _by_layers(self, latents: tuple, sigmas: tuple, noise_level, sigma_max) -> SdeStepScore:
        """What a derived class overrides, one after the other."""
        model_output, sample, prev_sample = (x.float() for x in latents)
        options = {} if sigma_max is None else {"sigma_max": sigma_max}
        mean, noise_std, std_dev_t = self.prev_sample_mean_and_std(
            model_output, sample, *sigmas, noise_level=noise_level, **options
        )
        log_prob = self.log_prob(prev_sample, mean, noise_std)
        return SdeStepScore(prev_sample, log_prob, mean, std_dev_t, noise_std)

    def transition(
        self,
        timesteps: Tensor,
        next_timesteps: Tensor,
        noise_level: float | Tensor,
        device: torch.device,
    ) -> Transition:
        """From the scheduler's grid, whose edges are made once, where that is asked for sigmas."""
        resolves = self._has_grid and not self._overrides("resolve_sigmas")
        if not resolves or isinstance(noise_level, Tensor):
            sigmas = self.resolve_sigmas(timesteps, next_timesteps, ndim=1)
            return self.between(*(s.to(device) for s in sigmas), noise_level)
        level = level_of(noise_level)
        grid = grid_of(self.scheduler.sigmas, device, step_coefficients, self.kind, level)
        at = step_index(self.scheduler, timesteps, device)
        return Transition(per_sample(grid.sampler, at), grid.std[at], grid.g[at])

    @property
    def _has_grid(self) -> bool:
        return self.kind == "flow_sde" and self.scheduler is not None

    def between(self, sigma: Tensor, sigma_next: Tensor, noise_level, sigma_max=None) -> Transition:
        """From sigmas. sigma_max: None is the scheduler's second one, which is also the next one of
        a grid's first edge."""
        sigma, sigma_next = (x.float().reshape(-1) for x in (sigma, sigma_next))
        if self.kind == "cps":  # which has no need of it, and gets a NaN
            sigma_max = None
        elif sigma_max is None and self.scheduler is not None:
            sigma_max = self.scheduler.sigmas[1]
        if isinstance(sigma_max, Tensor):
            sigma_max = sigma_max.to(sigma.device, torch.float32).reshape(-1)
        if isinstance(noise_level, Tensor):
            noise_level = noise_level.to(sigma.device, torch.float32).reshape(-1)
        edges = device_coefficients(sigma, sigma_next, self.kind, noise_level, sigma_max)
        std = edges.std.reshape(-1)
        g = std if self.kind == "cps" else std / (edges.sigma.reshape(-1) - sigma_next).sqrt()
        return Transition(edges, std, g)


class CpsSdeStepBackend(SdeStepBackend):
    """The same with kind="cps": a flag names a class and gives it no arguments."""

    kind = "cps"


def sde_step_with_logprob(
    scheduler,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    noise_level: float = 0.7,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """miles.utils.sde_log_prob's, which MILES's actor called before there were step backends.

    Args and returns: the first four of `SdeStepBackend.sde_step_logprob`.
    """
    backend, options = SdeStepBackend(scheduler), {"noise_level": noise_level}
    given = (model_output, timestep, timestep, sample)  # the scheduler knows what comes next
    return backend.sde_step_logprob(*given, prev_sample=prev_sample, **options)[:4]


def _takes_four() -> bool:
    """Does the MILES of this process take four values of sde_step_logprob? The first that had
    five called them SdeStepScore."""
    if "miles" not in sys.modules:
        return False
    try:  # it has not been imported where this backend is in its place
        theirs = import_module("miles.backends.fsdp_utils.sde_step_backend")
    except ImportError:
        return False
    return not hasattr(theirs, "SdeStepScore")


def _wide(x: Tensor, ndim: int) -> Tensor:
    """(B,) as (B, 1, ...)."""
    return x.reshape(-1, *[1] * (ndim - 1))
