"""flow_grpo's step for Wan and its step of an ODE, against the published formulas in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from flowkern.compat.flow_grpo import ode_step_with_logprob, wan_sde_step_with_logprob

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def scheduler():
    """Wan's own: UniPC on flow sigmas, whose timesteps are whole numbers."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(10)
    return scheduler


def columns(values, x):
    return values.double().reshape(-1, *[1] * (x.ndim - 1))


def published(sigmas, index, velocity, x, x_next, noise, determistic):
    """(x_next, log_prob, mean, g, sqrt(-dt)) in float64. The grid's .999999 counts as 1."""
    assert 1 - 1e-5 < sigmas[0] < 1
    sigmas = torch.where(sigmas > 1 - 1e-5, 1.0, sigmas)
    s, n = columns(sigmas[index], x), columns(sigmas[index + 1], x)
    velocity, x, dt = velocity.double(), x.double(), n - s
    g = sigmas[-1].double() + (sigmas[1] - sigmas[-1]).double() * s
    mean = x + dt * velocity + dt * g**2 * (x + (1 - s) * velocity) / (2 * s)
    std = g * torch.sqrt(-dt)
    if determistic:
        x_next = (x + dt * velocity).detach()
    elif x_next is None:
        x_next = mean + std * noise.double()
    squares = (x_next.double() - mean) ** 2 / (2 * std**2)
    log_prob = (-squares - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
    return x_next, log_prob, mean, g, torch.sqrt(-dt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("determistic", [False, True])
def test_wan_draw_and_replay_are_the_published_formula(scheduler, dtype, determistic):
    x, velocity = (torch.randn(3, 4, 2, 6, 6).to(dtype) for _ in range(2))
    for index in (torch.tensor([5]), torch.tensor([0, 4, 8])):
        at = scheduler.timesteps[index], x
        five = wan_sde_step_with_logprob(
            scheduler, velocity, *at, generator=torch.Generator().manual_seed(5),
            determistic=determistic, return_dt_and_std_dev_t=True,
        )  # fmt: skip
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        given = scheduler.sigmas, index, velocity, x
        theirs = published(*given, None, noise, determistic)
        for got, expected in zip(five, theirs, strict=True):
            assert got.dtype == torch.float32 and got.shape == expected.shape
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=3e-6)

        leaf, truth = (
            velocity.to(d, copy=True).requires_grad_() for d in (torch.float32, torch.float64)
        )
        stored = None if determistic else five[0]
        four = wan_sde_step_with_logprob(
            scheduler, leaf, *at, prev_sample=stored, determistic=determistic
        )
        assert len(four) == 4 and torch.equal(four[1], five[1])  # the ratio is exactly 1
        torch.testing.assert_close(four[3], five[3] * five[4])
        expected = published(scheduler.sigmas, index, truth, x, stored, noise, determistic)
        for log_prob, mean in (four[1:3], expected[1:3]):
            (log_prob.sum() + mean.square().mean()).backward()
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-4, atol=1e-6)


def test_wan_draws_the_noise_that_it_throws_away(scheduler):
    x, after = torch.randn(1, 4, 2, 6, 6), []
    for determistic in (False, True):
        torch.manual_seed(3)
        wan_sde_step_with_logprob(scheduler, x, scheduler.timesteps[:1], x, determistic=determistic)
        after.append(torch.randn(3))
    assert torch.equal(*after)


def test_errors(scheduler):
    x = torch.randn(1, 4, 2, 6, 6)
    with pytest.raises(ValueError, match="generator: prev_sample is given"):
        wan_sde_step_with_logprob(scheduler, x, scheduler.timesteps[:1], x, x, torch.Generator())
    with pytest.raises(ValueError, match="timestep: expected one of the scheduler's .*got 3$"):
        wan_sde_step_with_logprob(scheduler, x, torch.tensor([3]), x)  # UniPC takes its last step
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep: expected one of the scheduler's .*got 3$"):
        ode_step_with_logprob(euler, x, x, torch.tensor([3.0]), x)
    generators = [torch.Generator()] * 2
    with pytest.raises(ValueError, match="generator: expected one for each of 1 samples, got 2"):
        wan_sde_step_with_logprob(scheduler, x, scheduler.timesteps[:1], x, generator=generators)


def test_an_euler_step_is_scored_by_its_distance_from_another():
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    mine = SimpleNamespace(sigmas=sigmas, index_for_timestep=int)
    x, velocity, other, given = (torch.randn(3, 4, 5) for _ in range(4))
    for index in (torch.tensor([1]), torch.tensor([0, 2, 1])):
        s, n = columns(sigmas[index], x), columns(sigmas[index + 1], x)
        g = 0.9 * torch.sqrt(s / (1 - torch.where(s == 1, sigmas[1].double(), s)))
        for x_next in (None, given):
            leaf, truth = other.clone().requires_grad_(), other.double().requires_grad_()
            ours = ode_step_with_logprob(
                mine, velocity, leaf, index, x, 0.9, x_next, return_sqrt_dt=True
            )
            drawn = x.double() + (n - s) * velocity.double() if x_next is None else x_next.double()
            mean = x.double() + (n - s) * truth
            log_prob = -((drawn - mean) ** 2).flatten(1).mean(1)
            for got, expected in zip(
                ours, (drawn, log_prob, mean, g, torch.sqrt(s - n)), strict=True
            ):
                assert got.dtype == torch.float32 and got.shape == expected.shape
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
            for one in (ours[1].sum() + ours[2].mean(), log_prob.sum() + mean.mean()):
                one.backward()
            torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)
    assert len(ode_step_with_logprob(mine, velocity, other, index, x)) == 4
