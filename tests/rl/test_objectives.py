"""The clipped-ratio objective against the PPO formula in plain autograd, and the recipes."""

import math

import pytest
import torch

from flowkern.rl.algorithms import names, recipe
from flowkern.rl.objectives import RatioClip
from flowkern.rollout import Roots, run, sample_ids
from flowkern.schedules import sd3_sigmas

UNCOND = 2


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Linear(6, 6).double()


def velocity_of(module):
    def call(x_t, sigma, prompt):
        return module(x_t) * (1 + sigma[:, None]) + 0.2 * prompt[:, None]

    return call


def rollout_of(module, scale, keep_velocity):
    slots = torch.arange(2)
    roots = Roots(5, sample_ids(0, slots, 3), slots.repeat_interleave(3), (6,), torch.float64)
    chain = recipe("flow_grpo")(num_inference_steps=5).plan(sd3_sigmas)
    options = {"guidance_scale": scale, "uncond": UNCOND, "keep_velocity": keep_velocity}
    return run(chain, velocity_of(module), roots, 100, **options)


def rows(rollout):
    pair = torch.arange(len(rollout.chain.trained) * 6)
    return pair // 6, pair % 6


def log_prob(module, batch, scale):
    """log N(x_next; a x + b v, std), averaged over the elements, as the papers have it."""
    velocity, c = velocity_of(module), batch.coefficients
    v = velocity(batch.x_t, batch.sigma, batch.prompt)
    if scale != 1:
        uncond = velocity(batch.x_t, batch.sigma, torch.full_like(batch.prompt, UNCOND)).detach()
        v = uncond + scale * (v - uncond)
    mean, std = c.a[:, None] * batch.x_t + c.b[:, None] * v, c.std[:, None]
    density = -((batch.x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return density.mean(1), mean, std


@pytest.mark.parametrize("scale, kl_coef", [(1.0, 0.0), (3.0, 0.0), (3.0, 0.05)])
def test_on_policy_the_ratio_is_one_and_the_gradient_is_ppos(scale, kl_coef):
    module, base = network(0), network(1)
    rollout = rollout_of(module, scale, keep_velocity=False)
    batch = rollout.batch(*rows(rollout))
    advantage = torch.randn(len(batch.x_t), dtype=torch.float64)
    objective = RatioClip(1e-3, 1e-3, kl_coef, scale, UNCOND)
    out = objective(velocity_of(module), batch, advantage, velocity_of(base))
    assert torch.equal(out.ratio, torch.ones_like(out.ratio))
    assert not (out.clipped_low | out.clipped_high).any()
    (actual,) = torch.autograd.grad(out.loss, module.weight)

    new, mean, std = log_prob(module, batch, scale)
    ratio = (new - new.detach()).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-3, 1 + 1e-3)).sum()
    # KL against a reference that is guided by its own unconditional half
    reference = log_prob(base, batch, scale)[1].detach()
    kl = ((mean - reference) ** 2 / (2 * std**2)).mean(1).sum()
    (expected,) = torch.autograd.grad(loss + kl_coef * kl, module.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_off_policy_the_ratio_is_that_of_the_densities_and_clips():
    old, new = network(0), network(0)
    with torch.no_grad():
        new.weight.add_(0.02 * torch.randn_like(new.weight))
    rollout = rollout_of(old, 1.0, keep_velocity=True)
    batch = rollout.batch(*rows(rollout))
    advantage = torch.randn(len(batch.x_t), dtype=torch.float64)
    out = RatioClip(1e-3, 2e-3)(velocity_of(new), batch, advantage)
    expected = log_prob(new, batch, 1.0)[0] - log_prob(old, batch, 1.0)[0]
    torch.testing.assert_close(out.log_ratio, expected.detach(), rtol=0, atol=1e-10)
    ratio = expected.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-3, 1 + 2e-3)).sum()
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=0)
    assert out.clipped_low.any() and out.clipped_high.any()
    gradients = [torch.autograd.grad(x, new.weight)[0] for x in (out.loss, loss)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_the_released_defaults():
    paper = recipe("flow_grpo")()
    chain = paper.plan(sd3_sigmas)
    assert len(chain) == 10 and chain.trained == tuple(range(9))
    assert chain.has_kl and not recipe("flow_grpo")(kl_coef=0).plan(sd3_sigmas).has_kl
    assert (paper.group_size, paper.clip_range, paper.guidance_scale) == (24, 1e-4, 4.5)
    assert paper.group_size * recipe("flow_grpo")(guidance_scale=1).released_rows()[0] == 240
    assert paper.released_rows() == (20, 36), "guidance doubles, the reference doubles training"
    reward = torch.tensor([0.0, 1.0, 0.0, 10.0])
    advantage = paper.credit(reward, torch.tensor([0, 0, 1, 1]))
    expected = torch.tensor([-0.5, 0.5, -5, 5]) / (reward.std(correction=0) + 1e-4)
    torch.testing.assert_close(advantage, expected)
    assert "flow_grpo" in names()
    with pytest.raises(
        ValueError, match=r"algorithm\.name: got 'ppo', expected one of .*flow_grpo"
    ):
        recipe("ppo")
