"""The objectives on real rollouts against their formulas in plain autograd."""

import math

import pytest
import torch

from flowkern import philox_normal
from flowkern.rl.algorithms import names, recipe
from flowkern.rl.objectives import Matching, RatioClip
from flowkern.rollout import Guidance, Plan, Source, batch, prompt_ids, run
from flowkern.schedules import sd3_sigmas

UNCOND = 2


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Linear(6, 6).double()


def velocity_of(module):
    def call(x_t, sigma, prompt, on_host=None):
        return module(x_t) * (1 + sigma[:, None]) + 0.2 * prompt[:, None]

    return call


def rollout_of(module, guidance, keep_velocity, plan=None):
    plan = plan or recipe("flow_grpo")(num_inference_steps=5, group_size=3).plan(sd3_sigmas)
    source = Source(5, prompt_ids(0, torch.arange(2)), (6,), torch.float64)
    return run(plan, velocity_of(module), source, 100, guidance, keep_velocity)


def everything(rollout):
    """All rows of a rollout as one batch, with random advantages."""
    sites, choices = (
        len(rollout.plan.points or x) for x in (rollout.plan.origins, rollout.plan.trained)
    )
    pair = torch.arange(sites * 2)
    advantage = torch.randn(2, choices, dtype=torch.float64)
    return batch(rollout, pair // 2, pair % 2, advantage)


def rescaled(v, uncond, scale, sigma):
    """As a family may have it: as long as the conditional one, the more so with more noise."""
    both = uncond + scale * (v - uncond)
    return both * (v.norm(dim=1) / both.norm(dim=1))[:, None] + sigma[:, None] * v


def log_prob(module, batch, scale, guide=None, is_whole=False):
    """log N(x_next; a x + b v, std), averaged over the elements, as the papers have it."""
    velocity, c = velocity_of(module), batch.coefficients
    v = velocity(batch.x_t, batch.sigma, batch.prompt)
    if scale != 1:
        uncond = velocity(batch.x_t, batch.sigma, torch.full_like(batch.prompt, UNCOND))
        uncond = uncond if is_whole else uncond.detach()
        plain = uncond + scale * (v - uncond)
        v = plain if guide is None else guide(v, uncond, scale, batch.sigma)
    mean, std = c.a[:, None] * batch.x_t + c.b[:, None] * v, c.std[:, None]
    density = -((batch.x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return density.mean(1), mean, std


@pytest.mark.parametrize(
    "scale, kl_coef, guide", [(1, 0, None), (3, 0, None), (3, 0.05, None), (3, 0.05, rescaled)]
)
@pytest.mark.parametrize("is_whole", [False, True])
def test_on_policy_the_ratio_is_one_and_the_gradient_is_ppos(scale, kl_coef, guide, is_whole):
    module, base = network(0), network(1)
    guidance = Guidance.of(scale, UNCOND, guide)
    batch = everything(rollout_of(module, guidance, keep_velocity=False))
    advantage = batch.advantage
    objective = RatioClip(1e-3, 1e-3, kl_coef, guidance=guidance, uncond_gradient=is_whole)
    out = objective(batch, velocity_of(module), {"reference": velocity_of(base)})
    ratio = out.statistics["ratio_mean"]
    assert torch.equal(ratio, torch.ones_like(ratio))
    assert not any(out.statistics[f"pg_clipfrac_{side}"].any() for side in ("lower", "higher"))
    (actual,) = torch.autograd.grad(out.loss, module.weight)

    new, mean, std = log_prob(module, batch, scale, guide, is_whole)
    ratio = (new - new.detach()).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-3, 1 + 1e-3)).sum()
    # KL against a reference that is guided by its own unconditional half
    reference = log_prob(base, batch, scale, guide)[1].detach()
    kl = ((mean - reference) ** 2 / (2 * std**2)).mean(1).sum()
    (expected,) = torch.autograd.grad(loss + kl_coef * kl, module.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_off_policy_the_ratio_is_that_of_the_densities_and_clips():
    old, new = network(0), network(0)
    with torch.no_grad():
        new.weight.add_(0.02 * torch.randn_like(new.weight))
    batch = everything(rollout_of(old, None, keep_velocity=True))
    advantage = batch.advantage
    out = RatioClip(1e-3, 2e-3)(batch, velocity_of(new), {})
    expected = log_prob(new, batch, 1.0)[0] - log_prob(old, batch, 1.0)[0]
    found = out.statistics["ratio_mean"].log()
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-10)
    ratio = expected.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-3, 1 + 2e-3)).sum()
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=0)
    assert all(out.statistics[f"pg_clipfrac_{side}"].any() for side in ("lower", "higher"))
    gradients = [torch.autograd.grad(x, new.weight)[0] for x in (out.loss, loss)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_matching_noises_every_leaf_anew_and_pulls_to_its_anchors():
    plan = Plan()
    for member in range(3):
        leaf = plan.leaf(plan.step(plan.root(member), 0.0))
        for sigma in (0.9, 0.3):
            plan.match(leaf, sigma)
    module, base, ema = network(0), network(1), network(2)
    points = everything(rollout_of(module, None, False, plan))
    assert len(points.x0) == 12 and len(torch.unique(points.sigma)) == 2
    objective = Matching("awm", weighting="t", ref_coef=0.3, ema="mean", ema_coef=0.2)
    assert objective.anchors == ("reference", "mean") and objective.calls() == 3
    anchors = {"reference": velocity_of(base), "mean": velocity_of(ema)}
    out = objective(points, velocity_of(module), anchors)
    key = points.key
    noise = philox_normal((12, 6), key["seed"], key["sample_id"], key["step"], "match").double()
    assert len(torch.unique(noise)) == noise.numel(), "no two points share noise"
    sigma = points.sigma[:, None]
    arguments = ((1 - sigma) * points.x0 + sigma * noise, points.sigma, points.prompt)
    v, v_ref, v_ema = (velocity_of(m)(*arguments) for m in (module, base, ema))
    fit = (v - (noise - points.x0)).square().mean(1)
    loss = points.advantage * points.sigma * fit
    loss = loss + 0.3 * (v - v_ref.detach()).square().mean(1)
    loss = (loss + 0.2 * (v - v_ema.detach()).square().mean(1)).sum()
    gradients = [torch.autograd.grad(x, module.weight)[0] for x in (out.loss, loss)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
    assert torch.equal(out.statistics["ratio_mean"], torch.ones(12, dtype=torch.float64))
    distance = (v - v_ref).square().mean(1).detach()
    torch.testing.assert_close(out.statistics["kl"], distance, rtol=1e-9, atol=0)
    # A copy that equals the weights may be left out: it pulls at nothing.
    without = objective(points, velocity_of(module), {"reference": velocity_of(base)})
    same = objective(points, velocity_of(module), anchors | {"mean": velocity_of(module)})
    gradients = [torch.autograd.grad(x.loss, module.weight)[0] for x in (without, same)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_guided_reference_that_equals_the_weights_still_pulls():
    """It is left out among the anchors: with guidance it says something else than they do."""
    plan = Plan()
    plan.match(plan.leaf(plan.step(plan.root(0), 0.0)), 0.6)
    module = network(0)
    points = everything(rollout_of(module, None, False, plan))
    objective = Matching("awm", ref_coef=0.3, ref_guidance=Guidance(3.0, uncond=0))
    assert objective.calls() == 3 and objective.calls(current=["reference"]) == 3
    asked = []

    def counted(x_t, sigma, prompt, on_host=None):
        asked.append(len(x_t))
        return velocity_of(module)(x_t, sigma, prompt)

    out = objective(points, counted, {})
    there = objective(points, velocity_of(module), {"reference": velocity_of(module)})
    assert sum(asked) == 3 * len(points.x0)
    assert (out.statistics["kl"] > 0).any()
    torch.testing.assert_close(out.statistics["kl"], there.statistics["kl"], rtol=0, atol=0)


def test_algorithms_are_found_by_name():
    assert "flow_grpo" in names()
    with pytest.raises(
        ValueError, match=r"algorithm\.name: got 'ppo', expected one of .*flow_grpo"
    ):
        recipe("ppo")
