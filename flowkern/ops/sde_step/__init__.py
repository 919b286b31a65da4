"""One affine Gaussian step: draw, replay, and the deterministic step with history."""

from .api import ode_step, sde_log_prob, sde_step

__all__ = ["ode_step", "sde_log_prob", "sde_step"]
