"""float64 comes in, and the arithmetic and what is returned are float32, as the page says."""

from types import SimpleNamespace

import pytest
import torch

from flowkern.compat import dance_grpo, diffusion_nft, flow_grpo, g2rpo, mixgrpo, tempflow
from flowkern.schedules import shifted_sigmas

SIGMAS = shifted_sigmas(8, 3.0).float()
MINE = SimpleNamespace(sigmas=SIGMAS, index_for_timestep=int)
AT = torch.tensor([2, 3])
SOLVER = SimpleNamespace(
    dpm_algorithm_type="dpmsolver++", dpm_solver_order=2, dpm_solver_type="midpoint"
)
CALLS = {  # (velocity, x, x_next or None) -> a tuple that begins with x_next
    "flow_grpo": lambda v, x, n: flow_grpo.sde_step_with_logprob(MINE, v, AT, x, prev_sample=n),
    "Wan": lambda v, x, n: flow_grpo.wan_sde_step_with_logprob(MINE, v, AT, x, n),
    "ODE": lambda v, x, n: flow_grpo.ode_step_with_logprob(MINE, v, 2 * v, AT, x, prev_sample=n),
    "MixGRPO": lambda v, x, n: mixgrpo.flow_grpo_step(v, x, 0.7, SIGMAS, 2, n),
    "MixGRPO, dance": lambda v, x, n: mixgrpo.dance_grpo_step(v, x, 0.7, SIGMAS, 2, n, True, True),
    "DanceGRPO": lambda v, x, n: dance_grpo.flux_step(v, x, 0.7, SIGMAS, 2, n, True, True),
    "G2RPO": lambda v, x, n: g2rpo.flow_grpo_step(v, x, 0.7, SIGMAS, 2, n),
    "TempFlow-GRPO": lambda v, x, n: tempflow.sde_step_with_logprob(MINE, v, AT, x, n),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_draw_and_its_replay(name):
    x, velocity = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    drawn = CALLS[name](velocity, x, None)
    again = CALLS[name](velocity, x, drawn[0].double())
    narrow = CALLS[name](velocity.float(), x.float(), drawn[0])
    for one, other, third in zip(drawn, again, narrow, strict=True):
        assert one.dtype == torch.float32 == other.dtype
        assert torch.equal(one, other) and torch.equal(one, third)


def test_a_step_of_a_solver_and_whole_paths():
    x, velocity = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    for sde in (True, False):
        how = (2, SIGMAS[:-1], SIGMAS)
        for made in mixgrpo.dpm_step(SOLVER, velocity, x, *how, sde_solver=sde):
            assert made.dtype == torch.float32
    for solver in ("flow", "dance", "ddim"):
        path = diffusion_nft.run_sampling(lambda z, s: velocity, x, SIGMAS, solver, eta=0.3)
        assert path[0].dtype == torch.float64  # that of z, as theirs
        assert {log_prob.dtype for log_prob in path[2]} == {torch.float32}


def test_a_mean_alone_has_its_gradient_in_the_velocity_and_in_nothing_else():
    x, velocity = (torch.randn(2, 4, requires_grad=True) for _ in range(2))
    mean, _ = dance_grpo.flux_step(velocity, x, 0.7, SIGMAS, 2, None, False, True)
    of_x, of_velocity = torch.autograd.grad(mean.sum(), (x, velocity), allow_unused=True)
    assert of_x is None and of_velocity.abs().sum() > 0
