"""The peers' KL over g^2, by flowkern's KL and a coefficient per sample."""

import pytest
import torch

import flowkern as fk
from flowkern.compat.kl import kl_coef_over_g2

BETA = 0.04


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_kl_over_g2(kind):
    """Loss and gradient against mean((mean - mean_ref)^2) / (2 g^2) written out in float64, on
    edges of a grid and of the first one, each sample with its own.
    """
    grid = fk.schedules.sd3_sigmas(10)
    sigma, sigma_next = grid[[0, 3, 7]], grid[[1, 4, 8]]
    edges = fk.schedules.edge_coefficients(sigma, sigma_next, kind, 0.7, sigma_max=float(grid[1]))
    torch.manual_seed(0)
    x_t, velocity, ref, x_next = torch.randn(4, 3, 5, 4)

    t, dt = sigma[:, None, None], (sigma_next - sigma)[:, None, None]
    g = torch.full_like(t, 0.7)
    if kind == "flow_sde":
        g = 0.7 * (t / (1 - torch.where(t == 1, grid[1], t))).sqrt()
    v = velocity.double().requires_grad_()
    mean, mean_ref = (
        x_t * (1 + g**2 / (2 * t) * dt) + x * (1 + g**2 * (1 - t) / (2 * t)) * dt for x in (v, ref)
    )
    expected = BETA * ((mean - mean_ref).square() / (2 * g**2)).mean((1, 2))
    expected.mean().backward()

    own = velocity.clone().requires_grad_()
    coef = kl_coef_over_g2(BETA, *(x.float()[:, None] for x in (sigma, sigma_next)))
    zero = torch.zeros(3)
    out = fk.policy_loss(own, x_t, x_next, edges, zero, velocity_ref=ref, kl_coef=coef)
    out.loss.backward()
    torch.testing.assert_close(coef * out.kl, expected.float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(own.grad, v.grad.float(), rtol=2e-6, atol=1e-10)
