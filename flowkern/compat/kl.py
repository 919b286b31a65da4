"""The KL of projects that divide by the diffusion coefficient, as a coefficient of flowkern's."""

from __future__ import annotations

from torch import Tensor


def kl_coef_over_g2(beta: float, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """`kl_coef` of `fk.policy_loss` for beta mean((mean - mean_ref)^2) / (2 g^2): (B,).

    flow_grpo, MILES and verl-omni divide by the squared std_dev_t that their SDE step returns,
    which is g. A step's standard deviation is g sqrt(-dt), so the KL of the two Gaussians, which
    flowkern weighs, is theirs / (-dt), and their beta is beta (sigma - sigma_next) here. With
    "cps" their std_dev_t is the standard deviation itself: there kl_coef is beta.

    Args:
        beta: theirs, >= 0.
        sigma, sigma_next: (B,), or (B, 1, ...), of the edges; sigma_next < sigma.
    """
    return (beta * (sigma - sigma_next)).reshape(-1)
