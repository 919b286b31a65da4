"""The steps that DanceGRPO, G2RPO and TempFlow-GRPO define, against their formulas in float64."""

from types import SimpleNamespace

import published
import pytest
import torch
from published import wide

from flowkern.compat.dance_grpo import flux_step
from flowkern.compat.g2rpo import flow_grpo_step
from flowkern.compat.tempflow import sde_step_with_logprob, sde_step_with_logprob_perstep
from flowkern.schedules import shifted_sigmas

SIGMAS = shifted_sigmas(8, 3.0).float()


def close(got, expected, atol=3e-6):
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=atol)


def gradients_agree(ours, theirs, velocity):
    """ours, theirs: velocity -> (log_prob, another output that carries a gradient)."""
    leaves = []
    for call, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        leaf = velocity.to(dtype, copy=True).requires_grad_()
        log_prob, other = call(leaf)
        (log_prob.sum() + other.square().mean()).backward()
        leaves.append(leaf.grad.double())
    torch.testing.assert_close(*leaves, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sde_solver", [True, False])
def test_flux_step(dtype, sde_solver):
    x, velocity = torch.randn(2, 5, 8), torch.randn(2, 5, 8).to(dtype)
    formula = published.dance if sde_solver else published.euler_with_noise
    for index in (0, 3, 6):
        s, n = SIGMAS[index].double(), SIGMAS[index + 1].double()
        rest = (0.3, SIGMAS, index)
        torch.manual_seed(1)
        drawn = flux_step(velocity, x, *rest, None, True, sde_solver)
        torch.manual_seed(1)
        noise = torch.randn(x.shape)
        theirs = formula(s, n, velocity, x, 0.3, noise=noise)
        assert len(drawn) == 3
        for got, expected in zip(drawn, theirs, strict=False):
            close(got, expected)
        mean, x0 = flux_step(velocity, x, *rest, None, False, sde_solver)
        close(mean, theirs[3])
        assert torch.equal(x0, drawn[1])
        replayed = flux_step(velocity, x, *rest, drawn[0], True, sde_solver)
        assert replayed[0] is drawn[0] and torch.equal(replayed[2], drawn[2])  # the ratio is 1
        gradients_agree(
            lambda v: flux_step(v, x, *rest, drawn[0], True, sde_solver)[1:][::-1],  # noqa: B023
            lambda v: formula(s, n, v, x, 0.3, x_next=drawn[0])[1:3][::-1],  # noqa: B023
            velocity,
        )
    edge = flux_step(velocity, x, 0.0, SIGMAS, 7, None, True, sde_solver)
    assert torch.equal(edge[2], torch.zeros(2))  # theirs divides by 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flow_grpo_step_of_g2rpo(dtype):
    x, velocity = torch.randn(2, 5, 8), torch.randn(2, 5, 8).to(dtype)
    sigmas = torch.cat([SIGMAS[:3], SIGMAS[3::2]])  # a tail of another granularity
    for index in (0, 2, 3):
        s, n = sigmas[index].double(), sigmas[index + 1].double()
        drawn = flow_grpo_step(
            velocity, x, 0.7, sigmas, index, None, torch.Generator().manual_seed(2)
        )
        noise = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
        theirs = published.flow(s, n, velocity, x, 0.7, sigmas[1], noise=noise)
        for got, expected in zip(drawn, theirs, strict=False):
            close(got, expected)
        replayed = flow_grpo_step(velocity, x, 0.7, sigmas, index, drawn[0])
        assert torch.equal(replayed[2], drawn[2])
        how = {"x_next": drawn[0]}
        gradients_agree(
            lambda v: flow_grpo_step(v, x, 0.7, sigmas, index, drawn[0])[1:][::-1],  # noqa: B023
            lambda v: published.flow(s, n, v, x, 0.7, sigmas[1], **how)[1:3][::-1],  # noqa: B023
            velocity,
        )
    euler, _, log_prob = flow_grpo_step(velocity, x, 0, sigmas, 4, None)
    close(euler, x.double() + (sigmas[5] - sigmas[4]).double() * velocity.double())
    assert torch.equal(log_prob, torch.zeros(2))  # theirs is NaN
    with pytest.raises(ValueError, match="generator: prev_sample is given"):
        flow_grpo_step(velocity, x, 0.7, sigmas, 0, x, torch.Generator())
    with pytest.raises(ValueError, match="index: expected a step from 0 to 4, got 6"):
        flow_grpo_step(velocity, x, 0.7, sigmas, 6, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("determistic", [False, True])
def test_the_trunk_and_the_branches_of_tempflow(dtype, determistic):
    scheduler = SimpleNamespace(sigmas=SIGMAS, index_for_timestep=int)
    x, velocity = torch.randn(2, 4, 6), torch.randn(2, 4, 6).to(dtype)
    for index in (torch.tensor([3]), torch.tensor([0, 5])):
        for step, copies in ((sde_step_with_logprob, 1), (sde_step_with_logprob_perstep, 6)):
            copies = 1 if determistic else copies
            drawn = step(
                scheduler, velocity, index, x, None, torch.Generator().manual_seed(4), determistic,
                noise_level=0.9,
            )  # fmt: skip
            seen, v = (t.repeat_interleave(copies, 0) for t in (x, velocity))
            noise = torch.randn(seen.shape, dtype=dtype, generator=torch.Generator().manual_seed(4))
            edge = index if len(index) == 1 else index.repeat_interleave(copies)
            s, n = wide(SIGMAS[edge], seen), wide(SIGMAS[edge + 1], seen)
            how = {"noise": noise}
            if determistic:
                how = {"x_next": seen.double() + (n - s) * v.double()}
            theirs = published.flow(s, n, v, seen, 0.9, SIGMAS[1], **how)
            for i, got in zip((0, 2, 3, 4), drawn, strict=True):
                close(got, theirs[i])
    for count in (0, 2.5, "6", None):
        with pytest.raises(ValueError, match="num_samples: got .* expected a whole number from 1"):
            sde_step_with_logprob_perstep(scheduler, velocity, index, x, num_samples=count)
    leaf = velocity.float().requires_grad_()
    replayed = sde_step_with_logprob(scheduler, leaf, index, x, drawn[0][:2], noise_level=0.9)
    assert torch.is_tensor(torch.autograd.grad(replayed[1].sum() + replayed[2].sum(), leaf)[0])
