"""The drop-in against the published formula, on diffusers' own scheduler."""

import math
from types import SimpleNamespace

import pytest
import torch

from flowkern.compat.flow_grpo import sde_step_with_logprob

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def scheduler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def published(sigmas, index, velocity, x, noise_level, x_next, noise, sde_type):
    """The equations of Flow-GRPO and CPS in float64: the four returns, and sqrt(-dt)."""
    s, n = (sigmas.double()[i].reshape(-1, *[1] * (x.ndim - 1)) for i in (index, index + 1))
    v, x, dt = velocity.double(), x.double(), n - s
    if sde_type == "sde":
        g = noise_level * torch.sqrt(s / (1 - torch.where(s == 1, sigmas[1].double(), s)))
        mean = x + (v + g**2 / (2 * s) * (x + (1 - s) * v)) * dt
        std, returned = g * torch.sqrt(-dt), g
        constant = -std.log() - 0.5 * math.log(2 * math.pi)
        scale = 1 / (2 * std**2)
    else:
        std = returned = n * math.sin(noise_level * math.pi / 2)
        mean = (1 - n) * (x - s * v) + torch.sqrt(n**2 - std**2) * (x + (1 - s) * v)
        constant, scale = 0.0, 1.0
    if x_next is None:
        x_next = mean + std * noise.double()
    log_prob = (-((x_next.double() - mean) ** 2) * scale + constant).flatten(1).mean(1)
    return x_next, log_prob, mean, returned.expand(len(index), *[1] * (x.ndim - 1)), torch.sqrt(-dt)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_and_replay_are_the_published_formula(scheduler, sde_type, dtype):
    x, velocity = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    x, velocity = x.to(dtype), velocity.to(dtype)
    for steps in ([0, 0, 0], [0, 4, 8], [7, 1, 3]):
        index = torch.tensor(steps)
        timestep = scheduler.timesteps[index]
        generator = torch.Generator().manual_seed(5)
        ours = sde_step_with_logprob(
            scheduler,
            velocity,
            timestep,
            x,
            0.7,
            generator=generator,
            sde_type=sde_type,
            return_sqrt_dt=True,
        )
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        theirs = published(scheduler.sigmas, index, velocity, x, 0.7, None, noise, sde_type)
        for got, expected in zip(ours, theirs, strict=True):
            assert got.dtype == torch.float32 and got.shape == expected.shape
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)

        stored = ours[0]
        leaf = velocity.float().clone().requires_grad_()
        replay = sde_step_with_logprob(
            scheduler, leaf, timestep, x, 0.7, prev_sample=stored, sde_type=sde_type
        )
        assert replay[0] is stored and torch.equal(replay[1], ours[1])  # the ratio is exactly 1
        torch.testing.assert_close(replay[2], ours[2], rtol=0, atol=0)
        (replay[1].sum() + replay[2].square().mean()).backward()
        truth = velocity.double().requires_grad_()
        expected = published(scheduler.sigmas, index, truth, x, 0.7, stored, None, sde_type)
        (expected[1].sum() + expected[2].square().mean()).backward()
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-4, atol=1e-6)


def test_one_timestep_serves_the_batch_and_a_list_of_generators_is_per_sample(scheduler):
    x, velocity = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    both = sde_step_with_logprob(
        scheduler, velocity, scheduler.timesteps[3:4], x, generator=generators
    )
    assert both[3].shape == (1, 1, 1, 1)
    for i in (0, 1):
        one = sde_step_with_logprob(
            scheduler, velocity[i : i + 1], scheduler.timesteps[3:4], x[i : i + 1],
            generator=torch.Generator().manual_seed(i + 1),
        )  # fmt: skip
        assert torch.equal(one[0], both[0][i : i + 1]) and torch.equal(one[1], both[1][i : i + 1])


def test_any_object_with_sigmas_and_a_look_up_is_a_scheduler():
    sigmas = torch.tensor([1.0, 0.8, 0.4, 0.0])
    mine = SimpleNamespace(sigmas=sigmas, index_for_timestep=lambda t: int(t))
    x, velocity, noise = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 6)
    expected = published(sigmas, torch.tensor([0, 2]), velocity, x, 0.9, noise, None, "sde")
    got = sde_step_with_logprob(mine, velocity, torch.tensor([0, 2]), x, 0.9, prev_sample=noise)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    sigmas[1] = 0.9  # edited in place, as some solvers do: the coefficients follow
    expected = published(sigmas, torch.tensor([0, 0]), velocity, x, 0.9, noise, None, "sde")
    got = sde_step_with_logprob(mine, velocity, torch.tensor([0]), x, 0.9, prev_sample=noise)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_errors(scheduler):
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="sde_type: expected one of"):
        sde_step_with_logprob(scheduler, x, scheduler.timesteps[:1], x, sde_type="ode")
    with pytest.raises(ValueError, match="model_output: expected shape"):
        sde_step_with_logprob(scheduler, x[:1], scheduler.timesteps[:1], x)
