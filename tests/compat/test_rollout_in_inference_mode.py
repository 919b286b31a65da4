"""What a drop-in remembers of a rollout under torch.inference_mode serves training, too."""

from types import SimpleNamespace

import pytest
import torch

from flowkern.compat import awm, dance_grpo, diffusion_nft, flow_grpo, g2rpo, mixgrpo, tempflow
from flowkern.schedules import shifted_sigmas

X, CONFIG = torch.randn(2, 4, 8), SimpleNamespace(train=SimpleNamespace(cfg=False))
SOLVER = SimpleNamespace(
    dpm_algorithm_type="dpmsolver++", dpm_solver_order=1, dpm_solver_type="midpoint"
)


def scheduler(sigmas):
    return SimpleNamespace(sigmas=sigmas, index_for_timestep=int)


SIGMAS = shifted_sigmas(8, 3.0).float()
ONE, TWO = torch.tensor([2]), torch.tensor([2, 3])
CALLS = {  # (velocity, sigmas) -> something with a gradient in velocity
    "flow_grpo, one edge": lambda v, s: flow_grpo.sde_step_with_logprob(scheduler(s), v, ONE, X),
    "flow_grpo, two": lambda v, s: flow_grpo.sde_step_with_logprob(scheduler(s), v, TWO, X),
    "Wan": lambda v, s: flow_grpo.wan_sde_step_with_logprob(scheduler(s), v, ONE, X),
    "ODE": lambda v, s: flow_grpo.ode_step_with_logprob(scheduler(s), v, v, ONE, X),
    "MixGRPO": lambda v, s: mixgrpo.flow_grpo_step(v, X, 0.7, s, 2, X),
    "MixGRPO, dance": lambda v, s: mixgrpo.dance_grpo_step(v, X, 0.7, s, 2, X, True, True),
    "MixGRPO, solver": lambda v, s: mixgrpo.dpm_step(SOLVER, v, X, 2, s[1:], s, sde_solver=True),
    "DanceGRPO": lambda v, s: dance_grpo.flux_step(v, X, 0.7, s, 2, None, True, True),
    "DanceGRPO, mean": lambda v, s: dance_grpo.flux_step(v, X, 0.7, s, 2, None, False, True),
    "G2RPO": lambda v, s: g2rpo.flow_grpo_step(v, X, 0.7, s, 2, X),
    "TempFlow": lambda v, s: tempflow.sde_step_with_logprob_perstep(scheduler(s), v, ONE, X),
    "AWM": lambda v, s: awm.compute_log_prob_awm(
        lambda **_: (v,), None, None, torch.full((2, 1, 1), 0.5), None, None, CONFIG, X, X, X
    ),
}


REPLAYS = {  # (velocity, x_t, x_next) -> a log-probability
    "with the mean": lambda v, x, x_next: flow_grpo.sde_step_with_logprob(
        scheduler(SIGMAS), v, TWO, x, prev_sample=x_next
    )[1],
    "without": lambda v, x, x_next: dance_grpo.flux_step(v, x, 0.7, SIGMAS, 2, x_next, True, True)[
        2
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REPLAYS)
def test_latents_of_such_a_rollout_are_replayed(name, dtype):
    """The projects' formulas take them: autograd saves their differences, which training made."""
    with torch.inference_mode():
        x, x_next = X.to(dtype), (X + 0.1).to(dtype)
        x, x_next = x.clone(), x_next.clone()
    velocity = torch.randn(2, 4, 8)
    gradients = []
    for latents in ((x, x_next), (x.clone(), x_next.clone())):
        leaf = velocity.clone().requires_grad_()
        gradients += torch.autograd.grad(REPLAYS[name](leaf, *latents).sum(), leaf)
    assert x_next.is_inference() and torch.equal(*gradients)


@pytest.mark.parametrize("is_made_there", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_training_after_such_a_rollout(name, is_made_there):
    """is_made_there: the grid, too."""
    velocity = torch.randn(2, 4, 8)
    with torch.inference_mode(is_made_there):
        sigmas = shifted_sigmas(8, 3.0).float()
    with torch.inference_mode():
        CALLS[name](velocity, sigmas)
        diffusion_nft.run_sampling(lambda z, sigma: z, X, sigmas, "dpm2", determistic=True)
    leaf = velocity.requires_grad_()
    made = CALLS[name](leaf, sigmas)
    loss = sum(t.sum() for t in made if t.requires_grad)
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()
