"""DiffusionNFT's paths of every solver, step by step against their formulas in float64."""

import published
import pytest
import torch

from flowkern.compat.diffusion_nft import run_sampling
from flowkern.schedules import sd3_sigmas


def expected_step(solver, eta, sigmas, index, velocity, x, noise):
    s, n = sigmas[index].double(), sigmas[index + 1].double()
    if solver == "flow":
        return published.flow(s, n, velocity, x, eta, sigmas[1], noise=noise)
    if solver == "ddim":
        return published.ddim(s, n, velocity, x, eta, noise=noise)
    scale = 1 / (2 * eta**2 * (s - n))
    score = lambda *of: published.squares(scale, *of)  # noqa: E731
    return published.dance(s, n, velocity, x, eta, noise=noise, score=score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("solver, eta", [("flow", 0.7), ("dance", 0.3), ("ddim", 0.7), ("ddim", 1)])
def test_stochastic_paths(dtype, solver, eta):
    sigmas, seen = sd3_sigmas(6).float(), []

    def velocity_of(z, sigma):
        assert z.dtype == dtype and sigma.ndim == 0
        seen.append(torch.tanh(z) + sigma.to(dtype))
        return seen[-1]

    z = torch.randn(2, 4, 6, 6).to(dtype)
    torch.manual_seed(8)
    latents, states, log_probs = run_sampling(velocity_of, z, sigmas, solver, eta=eta)
    torch.manual_seed(8)
    assert latents is states[-1] and len(states) == 7 and len(log_probs) == 6
    for i, log_prob in enumerate(log_probs):
        noise = torch.randn(z.shape)
        x_next, _, scored, _, std = expected_step(solver, eta, sigmas, i, seen[i], states[i], noise)
        assert states[i + 1].dtype == dtype and log_prob.dtype == torch.float32
        bound = 3e-6 if dtype == torch.float32 else 2e-3 * max(1.0, float(x_next.abs().max()))
        torch.testing.assert_close(states[i + 1].double(), x_next, rtol=0, atol=bound)
        scored = scored if std > 0 else torch.zeros(2, dtype=torch.float64)  # theirs is NaN
        torch.testing.assert_close(log_prob.double(), scored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["flow", "ddim", "dpm1", "dpm2"])
@pytest.mark.parametrize("last", [0.0, 0.05])
def test_deterministic_paths(solver, last):
    sigmas = sd3_sigmas(6).float()
    sigmas[-2:] = torch.tensor([0.15, last])
    seen = []

    def velocity_of(z, sigma):
        seen.append(torch.tanh(z) + sigma)
        return seen[-1]

    z = torch.randn(2, 4, 6)
    _, states, log_probs = run_sampling(velocity_of, z, sigmas, solver, determistic=True)
    x0s = []
    for i, log_prob in enumerate(log_probs):
        s, n, x = sigmas[i].double(), sigmas[i + 1].double(), states[i].double()
        x0s.insert(0, x - s * seen[i].double())
        if solver.startswith("dpm"):
            order = 1 if i in (0, 5) else int(solver[-1])
            path = sigmas[i + 1 - order : i + 2].double()
            x_next, _ = published.dpm(path, x, x0s, order)
            assert log_prob is None
        else:  # without noise both are Euler's
            x_next = x + (n - s) * seen[i].double()
            assert torch.equal(log_prob, torch.zeros(2))  # theirs is NaN
        torch.testing.assert_close(states[i + 1].double(), x_next, rtol=1e-5, atol=3e-6)


def test_later_draws_are_theirs():
    """Also where their solvers draw what they do not use: ddim's steps, at both ends of dpm's."""
    sigmas, z = sd3_sigmas(5).float(), torch.randn(1, 4)
    for solver, draws in (("flow", 5), ("ddim", 5), ("dpm1", 2), ("dpm2", 2)):
        torch.manual_seed(1)
        run_sampling(lambda z, sigma: z, z, sigmas, solver, determistic=True)
        after = torch.randn(3)
        torch.manual_seed(1)
        for _ in range(draws):
            torch.randn(z.shape)
        assert torch.equal(torch.randn(3), after), solver


def test_what_is_refused():
    z, sigmas = torch.randn(1, 4), sd3_sigmas(4)
    with pytest.raises(ValueError, match="solver: expected one of .*'dpm2'.*, got 'dpm3'"):
        run_sampling(lambda z, sigma: z, z, sigmas, "dpm3")
    with pytest.raises(ValueError, match="determistic: dpm2 has no noise; expected True"):
        run_sampling(lambda z, sigma: z, z, sigmas, "dpm2")
    with pytest.raises(ValueError, match="eta: ddim takes one whose noise"):
        run_sampling(lambda z, sigma: z, z, sigmas, "ddim", eta=1.5)
