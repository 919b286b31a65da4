"""MILES's step backend and losses against the published formulas. MILES is not installed here:
simple namespaces play its context and batches, and a class that notes what it is told its metrics.
"""

import math
import sys
from types import ModuleType, SimpleNamespace

import published
import pytest
import torch

from flowkern.compat.miles import (
    CpsSdeStepBackend,
    SdeStepBackend,
    grpo_loss,
    nft_loss,
    sde_step_with_logprob,
)
from flowkern.schedules import sd3_sigmas

LEVEL = 0.7
KINDS = pytest.mark.parametrize("kind", ["flow_sde", "cps"])


class Scheduler:
    """The part of a diffusers scheduler that MILES asks."""

    def __init__(self):
        self.sigmas = sd3_sigmas(10).float()
        self.timesteps = 1000 * self.sigmas[:-1]

    def index_for_timestep(self, timestep):
        return int((self.timesteps == timestep).nonzero()[0])


class Metrics(dict):
    """Means and maxima by name, each said once."""

    def emit_mean(self, name, total, *, count):
        assert name not in self and torch.as_tensor(total).numel() == 1
        self[name] = float(total) / count

    def emit_max(self, name, value):
        assert name not in self
        self[name] = float(value)


def scored(kind, v, x, x_next, sigma, sigma_next, sigma_max):
    """log_prob, mean, noise_std and std_dev_t in float64."""
    s, n = (published.wide(t.reshape(-1), x) for t in (sigma, sigma_next))
    if kind == "cps":
        _, _, log_prob, mean, std = published.cps(s, n, v, x, LEVEL, x_next=x_next)
        return log_prob, mean, std, std
    how = {"sigma_max": sigma_max, "x_next": x_next}
    _, _, log_prob, mean, std = published.flow(s, n, v, x, LEVEL, **how)
    return log_prob, mean, std, std / torch.sqrt(s - n)


def close(found, expected, rtol=2e-6, atol=2e-6):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


def transitions(dtype=torch.float32, steps=(0, 4, 7)):
    torch.manual_seed(0)
    v, x, x_next = torch.randn(3, len(steps), 4, 5, 6).to(dtype)
    at, grid = torch.tensor(steps), Scheduler().sigmas
    return v, x, x_next, grid[at], grid[at + 1]


def backend_of(kind):
    return SdeStepBackend(Scheduler(), sde_timestep_divisor=1000.0, kind=kind)


# ---- the step backend ----


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_transition_is_scored(kind, dtype):
    v, x, x_next, sigma, sigma_next = transitions(dtype)
    backend, second = backend_of(kind), Scheduler().sigmas[1]
    leaf = v.clone().requires_grad_()
    score = backend.sde_step_logprob(
        leaf, 1000 * sigma, 1000 * sigma_next, x, prev_sample=x_next, noise_level=LEVEL
    )
    truth = v.double().requires_grad_()
    log_prob, mean, std, g = scored(kind, truth, x, x_next, sigma, sigma_next, second)
    assert torch.equal(score.prev_sample, x_next.float())
    assert all(part.dtype == torch.float32 for part in score)
    close(score.log_prob, log_prob)
    close(score.prev_mean, mean)
    close(score.noise_std, std)
    close(score.std_dev_t, g)
    (score.log_prob.sum() + score.prev_mean.square().mean()).backward()
    (log_prob.sum() + mean.square().mean()).backward()
    largest = float(truth.grad.abs().max())
    rounding = 2e-6 if dtype == torch.float32 else 2**-8
    close(leaf.grad, truth.grad, rtol=0, atol=rounding * largest)


@KINDS
def test_its_layers_are_the_same_step(kind):
    """What a backend of one's own overrides: sigmas, mean and deviation, log-probability."""
    v, x, x_next, sigma, sigma_next = transitions()
    backend = backend_of(kind)
    sigmas = backend.resolve_sigmas(1000 * sigma, 1000 * sigma_next, ndim=4)
    assert [s.shape for s in sigmas] == [(3, 1, 1, 1)] * 2
    close(sigmas[0].flatten(), sigma.double())
    close(sigmas[1].flatten(), sigma_next.double())
    leaf = v.clone().requires_grad_()
    mean, std, g = backend.prev_sample_mean_and_std(leaf, x, *sigmas, noise_level=LEVEL)
    second = Scheduler().sigmas[1]
    exact = scored(kind, v, x, x_next, sigma, sigma_next, second)
    for found, expected in zip((mean, std, g), exact[1:], strict=True):
        close(found, expected)
    close(backend.log_prob(x_next, mean, std), exact[0])
    (slope,) = torch.autograd.grad(
        backend.log_prob(x_next, mean, std).sum(), leaf, retain_graph=True
    )
    whole = backend.sde_step_logprob(
        leaf, 1000 * sigma, 1000 * sigma_next, x, prev_sample=x_next, noise_level=LEVEL
    )
    (once,) = torch.autograd.grad(whole.log_prob.sum(), leaf)
    torch.testing.assert_close(slope, once, rtol=1e-5, atol=1e-7)
    # Score centering: over steps drawn around another mean, the gradient is that at this mean.
    other, noise = mean.detach() + 0.1, torch.randn(x.shape)
    pair = sum(backend.log_prob(other + sign * std * noise, mean, std).sum() for sign in (1, -1))
    expected = backend.expected_log_prob(other, mean, std).sum()
    (drawn,) = torch.autograd.grad(pair / 2, leaf, retain_graph=True)
    (slope,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(slope, drawn, rtol=1e-4, atol=1e-6)


@KINDS
def test_the_contract_with_sigmas_has_four_values(kind):
    """Without a scheduler: sigmas and, for each transition, what stands for a sigma of 1."""
    v, x, x_next, sigma, sigma_next = transitions()
    second = torch.tensor([0.96, 0.9, 0.8])
    expected = scored(kind, v, x, x_next, sigma, sigma_next, second)
    backend = {"flow_sde": SdeStepBackend, "cps": CpsSdeStepBackend}[kind]()
    options = {"prev_sample": x_next, "noise_level": LEVEL, "sigma_max": second}
    by_name = {"sigmas": sigma, "next_sigmas": sigma_next}
    for found in (
        backend.sde_step_logprob(v, sigma, sigma_next, x, **options),
        backend.sde_step_logprob(v, x, **by_name, **options),
        backend.sde_step_logprob(v, sample=x, **by_name, **options),
    ):
        _, log_prob, mean, std_dev_t = found
        close(log_prob, expected[0])
        close(mean, expected[1])
        close(std_dev_t, expected[3])
    found = backend.prev_sample_mean_and_std(
        v, x, sigma, sigma_next, noise_level=LEVEL, sigma_max=second
    )
    close(found[0], expected[1])
    if kind == "cps":  # it has no such value, and is given one all the same
        options["sigma_max"] = torch.full((3,), math.nan)
        close(backend.sde_step_logprob(v, x, **by_name, **options)[1], expected[0])
    derived = type("Derived", (type(backend),), {"log_prob": lambda self, *of: of})()
    of = derived.sde_step_logprob(v, x, **by_name, **options)[1]
    close(of[1], expected[1])
    near = {"sigmas": torch.tensor([0.999993]), "next_sigmas": torch.tensor([0.99])}
    if kind == "flow_sde":  # a grid that is rounded
        one = backend.sde_step_logprob(
            v[:1], x[:1], prev_sample=x[:1], noise_level=LEVEL, sigma_max=0.99, **near
        )
        assert float(one[3]) == pytest.approx(LEVEL * 10, rel=1e-5)


@KINDS
def test_a_noise_level_may_be_a_tensor(kind):
    v, x, x_next, sigma, sigma_next = transitions()
    found, expected = (
        backend_of(kind).sde_step_logprob(
            v, 1000 * sigma, 1000 * sigma_next, x, prev_sample=x_next, noise_level=level
        )
        for level in (torch.full((3,), LEVEL), LEVEL)
    )
    for part, same in zip(found, expected, strict=True):
        torch.testing.assert_close(part, same, rtol=2e-6, atol=2e-6)


class Shifted(SdeStepBackend):
    """Derived: sigmas of its own."""

    def resolve_sigmas(self, timesteps, next_timesteps, *, ndim):
        shape = (-1, *[1] * (ndim - 1))
        return tuple((t / 1000).reshape(shape) for t in (timesteps, next_timesteps))


class Louder(SdeStepBackend):
    """Derived: a deviation of its own."""

    def prev_sample_mean_and_std(self, *given, **level):
        mean, std, g = super().prev_sample_mean_and_std(*given, **level)
        return mean, 2 * std, g


def test_a_derived_backend_has_its_own_layers():
    """In a score and in the loss, which asks it."""
    v, x, x_next, sigma, sigma_next = transitions(steps=(1, 4, 7))
    given = (v, 1000 * sigma, 1000 * sigma_next, x)
    options = {"prev_sample": x_next, "noise_level": LEVEL}
    plain = backend_of("flow_sde").sde_step_logprob(*given, **options)
    shifted = Shifted(Scheduler()).sde_step_logprob(v, 900 * sigma, 900 * sigma_next, x, **options)
    second = Scheduler().sigmas[1]
    expected = scored("flow_sde", v, x, x_next, 0.9 * sigma, 0.9 * sigma_next, second)
    close(shifted.log_prob, expected[0])
    louder = Louder(Scheduler())
    score = louder.sde_step_logprob(*given, **options)
    torch.testing.assert_close(score.noise_std, 2 * plain.noise_std)
    own = louder.log_prob(x_next, plain.prev_mean, 2 * plain.noise_std)
    torch.testing.assert_close(score.log_prob, own)

    ctx, batch, prepared, v, _ = micro_batch("flow_sde", backend=louder)
    grpo_loss(ctx, batch, prepared, new_pred=v, metrics=Metrics(), write_old_log_prob=True)
    score = louder.sde_step_logprob(
        v, prepared.timesteps, prepared.extras["next_timesteps"], prepared.latents,
        prev_sample=prepared.extras["next_latents"], noise_level=LEVEL,
    )  # fmt: skip
    stored = torch.stack([pair["log_prob_old"] for pair in batch])
    torch.testing.assert_close(stored, score.log_prob, rtol=2e-6, atol=2e-6)


def test_the_miles_that_takes_four_gets_four(monkeypatch):
    """Its loss has no room for a fifth; the first MILES whose loss has calls it SdeStepScore."""
    v, x, x_next, sigma, sigma_next = transitions()
    theirs = ModuleType("miles.backends.fsdp_utils.sde_step_backend")
    for name, module in (("miles", ModuleType("miles")), (theirs.__name__, theirs)):
        monkeypatch.setitem(sys.modules, name, module)
    given = (v, 1000 * sigma, 1000 * sigma_next, x)
    options = {"prev_sample": x_next, "noise_level": LEVEL}
    assert len(backend_of("cps").sde_step_logprob(*given, **options)) == 4
    theirs.SdeStepScore = object
    assert len(backend_of("cps").sde_step_logprob(*given, **options)) == 5


def test_the_function_before_there_were_backends():
    v, x, x_next, sigma, sigma_next = transitions()
    found = sde_step_with_logprob(Scheduler(), v, 1000 * sigma, x, x_next, LEVEL)
    second = Scheduler().sigmas[1]
    log_prob, mean, _, g = scored("flow_sde", v, x, x_next, sigma, sigma_next, second)
    for part, expected in zip(found, (x_next.double(), log_prob, mean, g), strict=True):
        close(part, expected)


def test_backends_say_what_they_cannot_do():
    v, x, x_next, sigma, sigma_next = transitions()
    unknown = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="^timesteps: expected one of the scheduler's"):
        backend_of("flow_sde").sde_step_logprob(
            v, unknown, unknown, x, prev_sample=x_next, noise_level=LEVEL
        )
    with pytest.raises(ValueError, match="kind: expected 'flow_sde' or 'cps', got 'ode'"):
        SdeStepBackend(kind="ode")
    score, options = backend_of("flow_sde").sde_step_logprob, {"noise_level": LEVEL}
    for name, call in {
        "sample": lambda: score(v, unknown, unknown, prev_sample=x, **options),
        "prev_sample": lambda: score(v, unknown, unknown, x, prev_sample=None, **options),
        "next_sigmas": lambda: score(v, x, sigmas=unknown, prev_sample=x, **options),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor, got None"):
            call()
    for name, at in {"model_output": 0, "prev_sample": 4}.items():
        given = [v, 1000 * sigma, 1000 * sigma_next, x, x]
        given[at] = given[at][:, :2]
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            score(*given[:4], prev_sample=given[4], **options)
    with pytest.raises(ValueError, match="^timesteps: expected one or 3, one per sample; got 2"):
        score(v, 1000 * sigma[:2], 1000 * sigma_next[:2], x, prev_sample=x, **options)


@KINDS
def test_a_step_without_noise_is_scored_as_0_by_layers_too(kind):
    v, x, x_next, sigma, sigma_next = transitions()
    backend = backend_of(kind)
    options = {"prev_sample": x_next, "noise_level": 0.0}
    whole = backend.sde_step_logprob(v, 1000 * sigma, 1000 * sigma_next, x, **options)
    mean = whole.prev_mean.requires_grad_()
    by_layers = backend.log_prob(x_next.double(), mean, whole.noise_std)
    torch.testing.assert_close(by_layers, whole.log_prob)
    (slope,) = torch.autograd.grad(by_layers.sum(), mean)
    assert slope.isfinite().all()


def test_a_backend_takes_a_level_as_wide_as_its_sigmas_and_sigmas_of_the_host():
    v, x, _, sigma, sigma_next = transitions()
    backend = backend_of("flow_sde")
    wide = torch.full((3, 1, 1, 1), LEVEL)
    found, expected = (
        backend.prev_sample_mean_and_std(v, x, sigma, sigma_next, noise_level=level)
        for level in (wide, LEVEL)
    )
    for part, same in zip(found, expected, strict=True):
        torch.testing.assert_close(part, same, rtol=2e-6, atol=2e-6)
    elsewhere = (t.to("meta") for t in (v, x))
    mean, *_ = backend.prev_sample_mean_and_std(
        *elsewhere, sigma[1], sigma_next[1], noise_level=LEVEL
    )
    assert mean.device.type == "meta"


# ---- Flow-GRPO ----


class OfOnesOwn:
    """A backend that is not flowkern's: the mean and deviation of the published formula."""

    def __init__(self, kind, bend=0.0):
        self.kind, self.bend, self.inner = kind, bend, backend_of(kind)
        self.resolve_sigmas, self.log_prob = self.inner.resolve_sigmas, self.inner.log_prob

    def prev_sample_mean_and_std(self, model_output, sample, sigma, sigma_prev, *, noise_level):
        assert noise_level == LEVEL
        second = Scheduler().sigmas[1]
        given = (model_output, sample, sample, sigma, sigma_prev, second)
        _, mean, std, g = scored(self.kind, *given)
        return mean + self.bend * model_output * sample, std, g


def micro_batch(kind, dtype=torch.float32, beta=0.0, **change):
    """ctx, batch, prepared, and the velocities, of which the second is the reference's."""
    v, x, x_next, sigma, sigma_next = transitions(dtype, steps=(0, 3, 4, 5, 7, 8))
    args = {"diffusion_clip_range": 1e-3, "diffusion_noise_level": LEVEL, "diffusion_kl_beta": beta}
    backend = change.pop("backend", None) or backend_of(kind)
    ctx = SimpleNamespace(
        args=SimpleNamespace(**args, **change),
        sde_backend=backend,
        models={"transformer": None},
        device=x.device,
    )
    old = scored(kind, v, x, x_next, sigma, sigma_next, Scheduler().sigmas[1])[0]
    extras = {"next_latents": x_next.float(), "next_timesteps": 1000 * sigma_next}
    # Ratios on both sides of the clip range and inside of it.
    extras["log_prob_old"] = (old + torch.tensor([2e-3, -2e-3, 5e-4, 2e-3, -2e-3, 0.0])).float()
    prepared = SimpleNamespace(
        latents=x.float(),
        timesteps=1000 * sigma,
        advantage=torch.tensor([1.0, 0.5, -2.0, -1.0, -0.3, 0.7]),
        component_name="transformer",
        extras=extras,
    )
    reference = v + 0.1 * torch.randn(v.shape).to(dtype)
    return ctx, [{} for _ in v], prepared, v, reference


def published_grpo(kind, ctx, prepared, v, v_ref, on_policy=False):
    """The chain in float64: the loss and its metrics."""
    args, extras, advantage = ctx.args, prepared.extras, prepared.advantage.double()
    sigma, sigma_next = (t / 1000 for t in (prepared.timesteps, extras["next_timesteps"]))
    given = (prepared.latents, extras["next_latents"], sigma, sigma_next, Scheduler().sigmas[1])
    log_prob, mean, _, g = scored(kind, v, *given)
    old = log_prob.detach() if on_policy else extras["log_prob_old"].double()
    ratio, clip = (log_prob - old).exp(), args.diffusion_clip_range
    clipped = ratio.clamp(1 - clip, 1 + clip)
    policy = torch.maximum(-advantage * ratio, -advantage * clipped)
    kl = torch.zeros_like(policy)
    if args.diffusion_kl_beta > 0:
        mean_ref = scored(kind, v_ref, *given)[1]
        kl = ((mean - mean_ref) ** 2 / (2 * g**2)).flatten(1).mean(1)
    loss = policy.sum() + args.diffusion_kl_beta * kl.sum()
    log_ratio, off = log_prob - old, (ratio - 1).abs()
    metrics = {
        "loss": loss / len(kl),
        "policy_loss": policy.mean(),
        "kl_loss": kl.mean(),
        "loss_abs_mean": policy.abs().mean(),
        "adv_abs_mean": advantage.abs().mean(),
        "ratio_abs_minus_1": off.mean(),
        "approx_kl": 0.5 * log_ratio.square().mean(),
        "clipfrac": (off > clip).double().mean(),
        "log_prob_new_idx_0": log_prob[0],
        "log_prob_old_idx_0": old[0],
        "log_prob_mean_abs_diff": log_ratio.abs().mean(),
    }
    return loss, {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}


@KINDS
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grpo(kind, beta, on_policy, dtype):
    """Loss, gradient and every metric of MILES's; with a KL that divides by std_dev_t."""
    ctx, batch, prepared, v, v_ref = micro_batch(kind, dtype, beta)
    leaf, metrics = v.clone().requires_grad_(), Metrics()
    loss = grpo_loss(
        ctx, batch, prepared, new_pred=leaf, ref_pred=v_ref if beta else None, metrics=metrics,
        old_log_prob_from_new=on_policy,
    )  # fmt: skip
    loss.backward()
    truth = v.double().requires_grad_()
    expected, expected_metrics = published_grpo(kind, ctx, prepared, truth, v_ref, on_policy)
    expected.backward()
    close(loss, expected, atol=3e-6)
    largest = float(truth.grad.abs().max())
    close(leaf.grad, truth.grad, rtol=0, atol=(5e-6 if dtype == torch.float32 else 2**-8) * largest)
    assert metrics.keys() == expected_metrics.keys()
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)


@KINDS
def test_grpo_stores_what_it_is_asked_to_store(kind):
    """The first update's ratio is then that of one kernel with itself."""
    ctx, batch, prepared, v, _ = micro_batch(kind)
    call = {"new_pred": v, "ref_pred": None, "metrics": Metrics()}
    assert grpo_loss(ctx, batch, prepared, **call, write_old_log_prob=True) is None
    assert not call["metrics"]
    stored = torch.stack([pair["log_prob_old"] for pair in batch])
    given = (prepared.timesteps / 1000, prepared.extras["next_timesteps"] / 1000)
    x_next, second = prepared.extras["next_latents"], Scheduler().sigmas[1]
    close(stored, scored(kind, v, prepared.latents, x_next, *given, second)[0])
    prepared.extras["log_prob_old"] = stored
    grpo_loss(ctx, batch, prepared, **call)
    assert call["metrics"]["ratio_abs_minus_1"] <= 2e-7


@KINDS
def test_grpo_of_pairs_with_sigmas(kind):
    """As MILES has them where pairs carry sigmas; what is neither form is said."""
    ctx, batch, prepared, v, _ = micro_batch(kind)
    call = {"new_pred": v, "metrics": Metrics()}
    expected = grpo_loss(ctx, batch, prepared, **call)
    sigma, sigma_next = prepared.timesteps / 1000, prepared.extras.pop("next_timesteps") / 1000
    prepared.extras |= {"sigmas": sigma, "next_sigmas": sigma_next}
    prepared.extras["sigma_max"] = Scheduler().sigmas[1].expand(len(v))
    found = grpo_loss(ctx, batch, prepared, **call | {"metrics": Metrics()})
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    ctx.sde_backend = OfOnesOwn(kind)
    with pytest.raises(ValueError, match="--sde-step-backend-path: of pairs with sigmas"):
        grpo_loss(ctx, batch, prepared, **call)
    del prepared.extras["next_sigmas"]
    with pytest.raises(ValueError, match="prepared.extras: expected next_timesteps, or sigmas"):
        grpo_loss(ctx, batch, prepared, **call)


@KINDS
def test_grpo_asks_a_backend_of_ones_own(kind):
    """Its mean and deviation are those of the loss; a mean that is not affine is refused."""
    ours, theirs = (
        micro_batch(kind, beta=0.04, backend=backend) for backend in (None, OfOnesOwn(kind))
    )
    losses, gradients = [], []
    for ctx, batch, prepared, v, v_ref in (ours, theirs):
        leaf = v.clone().requires_grad_()
        losses.append(
            grpo_loss(ctx, batch, prepared, new_pred=leaf, ref_pred=v_ref, metrics=Metrics())
        )
        losses[-1].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)

    class Bent(OfOnesOwn):
        pass

    ctx, batch, prepared, v, _ = micro_batch(kind, backend=Bent(kind, bend=0.1))
    with pytest.raises(ValueError, match="grpo_loss needs a mean a x_t . b velocity, Bent has"):
        grpo_loss(ctx, batch, prepared, new_pred=v, metrics=Metrics())


def test_grpo_compares_with_the_rollout():
    """Debugging tensors that the rollout may have left with each pair."""
    ctx, batch, prepared, v, _ = micro_batch("flow_sde")
    ctx.models["transformer_2"] = None
    recorded = v + 1e-3 * torch.randn(v.shape)
    for pair, one in zip(batch, recorded, strict=True):
        pair["rollout_debug_tensors"] = {"rollout_step_model_output": one}
    metrics = Metrics()
    grpo_loss(ctx, batch, prepared, new_pred=v, metrics=metrics)
    away = (v - recorded).abs()
    expected = {
        "model_output_mean_abs_diff": float(away.mean()),
        "model_output_mean_abs_diff_transformer": float(away.mean()),
        "model_output_max_abs_diff": float(away.max()),
        "model_output_rel_max": float(away.max() / recorded.abs().max()),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    both = "log_prob_mean_abs_diff", "log_prob_mean_abs_diff_transformer"
    assert metrics[both[0]] == metrics[both[1]] > 0
    del batch[0]["rollout_debug_tensors"]
    grpo_loss(ctx, batch, prepared, new_pred=v, metrics=(metrics := Metrics()))
    assert "model_output_max_abs_diff" not in metrics


@KINDS
def test_grpo_centers_the_score(kind):
    """A constant advantage moves nothing in expectation over the rollout's own steps: the mean of
    a step and its mirror image. The loss is what it was, and cut samples are not corrected.
    """
    ctx, batch, prepared, v, _ = micro_batch(kind, diffusion_score_centering=True)
    prepared.advantage = torch.ones(6)
    sigmas = ctx.sde_backend.resolve_sigmas(
        prepared.timesteps, prepared.extras["next_timesteps"], ndim=4
    )
    mean, std, _ = ctx.sde_backend.prev_sample_mean_and_std(
        v, prepared.latents, *sigmas, noise_level=LEVEL
    )
    rollout, noise = mean + 0.3 * std * torch.randn(v.shape), torch.randn(v.shape)
    for pair, one in zip(batch, rollout, strict=True):
        pair["rollout_debug_tensors"] = {"rollout_step_prev_sample_mean": one}

    def gradient(sign, centering, **change):
        ctx.args.diffusion_score_centering = centering
        prepared.extras["next_latents"] = rollout + sign * std * noise
        leaf, metrics = v.clone().requires_grad_(), Metrics()
        call = {"new_pred": leaf, "metrics": metrics, "old_log_prob_from_new": True} | change
        loss = grpo_loss(ctx, batch, prepared, **call)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics

    (plain, drift, metrics), (centred, moved, _) = (gradient(1, c) for c in (False, True))
    assert torch.equal(plain, centred)
    drift, moved = drift + gradient(-1, False)[1], moved + gradient(-1, True)[1]
    assert float(moved.abs().max()) < 2e-6 * float(drift.abs().max())
    rms = ((rollout - mean).double() / std).square().flatten(1).mean(1).sqrt().mean()
    assert metrics["prev_mean_diff_over_noise_std"] == pytest.approx(float(rms), rel=1e-5)

    prepared.extras["log_prob_old"] = torch.full((6,), -50.0)  # far beyond the clip range
    cut = gradient(1, True, old_log_prob_from_new=False)[1]
    assert not cut.any()
    for pair in batch:
        pair["rollout_debug_tensors"]["rollout_step_prev_sample_mean"] = torch.zeros(120)
    with pytest.raises(ValueError, match="laid out unlike"):
        gradient(1, True)
    assert gradient(1, False)[2]["prev_mean_diff_over_noise_std"] > 0
    with pytest.raises(ValueError, match="--diffusion-debug-mode"):
        batch[0].clear()
        gradient(1, True)


@KINDS
@pytest.mark.parametrize("centering", [False, True])
def test_grpo_of_a_step_without_noise_has_no_kl(kind, centering):
    """The last edge of cps, or a noise level of 0: one such sample leaves a batch finite."""
    level = LEVEL if kind == "cps" else 0.0
    ctx, batch, prepared, v, v_ref = micro_batch(kind, beta=0.04)
    ctx.args.diffusion_noise_level, ctx.args.diffusion_score_centering = level, centering
    prepared.timesteps[-1] = 1000 * Scheduler().sigmas[9]
    prepared.extras["next_timesteps"][-1] = 0.0
    for pair, mean in zip(batch, prepared.extras["next_latents"], strict=True):
        pair["rollout_debug_tensors"] = {"rollout_step_prev_sample_mean": mean}
    leaf, metrics = v.clone().requires_grad_(), Metrics()
    call = {"ref_pred": v_ref, "metrics": metrics, "old_log_prob_from_new": True}
    loss = grpo_loss(ctx, batch, prepared, new_pred=leaf, **call)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()
    assert all(map(math.isfinite, metrics.values()))


def test_grpo_without_a_reference_has_no_kl():
    ctx, batch, prepared, v, _ = micro_batch("cps", beta=0.1)
    with pytest.raises(ValueError, match="ref_pred: needed for --diffusion-kl-beta > 0, got None"):
        grpo_loss(ctx, batch, prepared, new_pred=v, metrics=Metrics())


@pytest.mark.parametrize(
    "name, change",
    {
        "--diffusion-clip-range": lambda c, p: vars(c.args).update(diffusion_clip_range=None),
        "--diffusion-kl-beta": lambda c, p: vars(c.args).update(diffusion_kl_beta=None),
        "--diffusion-noise-level": lambda c, p: vars(c.args).update(diffusion_noise_level=None),
        "prepared.extras: expected log_prob_old": lambda c, p: p.extras.pop("log_prob_old"),
        "prepared.extras: expected next_latents": lambda c, p: p.extras.pop("next_latents"),
        "prepared.advantage": lambda c, p: vars(p).update(advantage=p.advantage[:2]),
        "prepared.latents": lambda c, p: vars(p).update(latents=p.latents[:, :2]),
    }.items(),
)
def test_grpo_says_what_is_off_in_miles_words(name, change):
    ctx, batch, prepared, v, _ = micro_batch("flow_sde")
    change(ctx, prepared)
    with pytest.raises(ValueError, match=f"^{name}"):
        grpo_loss(ctx, batch, prepared, new_pred=v, metrics=Metrics())


# ---- DiffusionNFT ----


def published_nft(args, x0, x_t, t, advantage, v, v_old):
    """The two-branch loss on predictions of x0, in float64, and its metrics."""
    x0, x_t, v, v_old = x0.double(), x_t.double(), v.double(), v_old.double()
    wide, beta, cap = t.double().reshape(-1, 1, 1, 1), args.diffusion_nft_beta, 5.0
    if hasattr(args, "diffusion_adv_clip_max"):
        cap = args.diffusion_adv_clip_max
    r = (advantage.double().clamp(-cap, cap) / cap / 2 + 0.5).clamp(0, 1)
    branches = []
    for towards in (v_old + beta * (v - v_old), v_old - beta * (v - v_old)):
        away = x_t - wide * towards - x0
        squared = away.square().flatten(1).mean(1)
        if args.diffusion_nft_adaptive_weight:
            squared = squared / away.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        branches.append(squared)
    pair = (r * branches[0] + (1 - r) * branches[1]) / beta * cap
    metrics = {
        "loss": 4 * pair.mean(),
        "nft_loss": 4 * pair.mean(),
        "nft_loss_per_pair": pair.mean(),
        "nft_r_mean": r.mean(),
        "nft_pos_loss": branches[0].mean(),
        "nft_neg_loss": branches[1].mean(),
        "nft_adv_mean": advantage.mean(),
        "nft_t_mean": t.mean(),
        "nft_num_timesteps": 4,
        "adv_abs_mean": advantage.abs().mean(),
    }
    return pair.sum(), {name: float(torch.as_tensor(x).detach()) for name, x in metrics.items()}


def nft_batch(beta=1.0, is_adaptive=True, **change):
    torch.manual_seed(0)
    x0, noise, v, v_old = torch.randn(4, 5, 4, 5, 6)
    t = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.03])
    args = SimpleNamespace(
        diffusion_nft_beta=beta, diffusion_nft_adaptive_weight=is_adaptive, **change
    )
    prepared = SimpleNamespace(
        latents=torch.lerp(x0, noise, t.reshape(-1, 1, 1, 1)),
        timesteps=t,
        advantage=torch.tensor([-7.0, 6.0, 0.0, 2.0, -1.0]),
        extras={"x0": x0},
    )
    batch = [{"nft_num_timesteps": 4} for _ in t]
    return SimpleNamespace(args=args), batch, prepared, v, v - 0.1 * v_old


@pytest.mark.parametrize("beta", [1.0, 0.1, 2.0])
@pytest.mark.parametrize("is_adaptive", [True, False])
@pytest.mark.parametrize("cap", [5.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nft(beta, is_adaptive, cap, dtype):
    """Loss, gradient and every metric, the two branches among them; advantages beyond the cap."""
    ctx, batch, prepared, v, v_old = nft_batch(beta, is_adaptive, diffusion_adv_clip_max=cap)
    v, v_old = v.to(dtype), v_old.to(dtype)
    leaf, metrics = v.clone().requires_grad_(), Metrics()
    loss = nft_loss(ctx, batch, prepared, new_pred=leaf, ref_pred=v_old, metrics=metrics)
    loss.backward()
    truth = v.double().requires_grad_()
    given = (prepared.extras["x0"], prepared.latents, prepared.timesteps, prepared.advantage)
    expected, expected_metrics = published_nft(ctx.args, *given, truth, v_old)
    expected.backward()
    close(loss, expected, rtol=5e-6)
    largest = float(truth.grad.abs().max())
    close(leaf.grad, truth.grad, rtol=0, atol=(5e-6 if dtype == torch.float32 else 2**-8) * largest)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("is_adaptive", [True, False])
def test_nft_of_a_sample_at_0(is_adaptive):
    """Its prediction is x_t, whatever the velocity is: no loss, and the others keep theirs."""
    ctx, batch, prepared, v, v_old = nft_batch(0.5, is_adaptive)
    ctx.args.diffusion_adv_clip_max = 5.0
    prepared.timesteps = prepared.timesteps.double()
    prepared.timesteps[-1], prepared.latents[-1] = 0.0, prepared.extras["x0"][-1]
    leaf, metrics = v.clone().requires_grad_(), Metrics()
    loss = nft_loss(ctx, batch, prepared, new_pred=leaf, ref_pred=v_old, metrics=metrics)
    loss.backward()
    truth = v.double().requires_grad_()
    given = (prepared.extras["x0"], prepared.latents, prepared.timesteps, prepared.advantage)
    expected, expected_metrics = published_nft(ctx.args, *given, truth, v_old)
    expected.backward()
    close(loss, expected, rtol=5e-6)
    close(leaf.grad, truth.grad, rtol=0, atol=5e-6 * float(truth.grad.abs().max()))
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)


def test_nft_takes_its_arguments_where_they_are():
    """The old policy's velocity under either name, its own cap before that of Flow-GRPO; what MILES
    asks of the function itself; and what there is not.
    """
    ctx, batch, prepared, v, v_old = nft_batch(diffusion_adv_clip_max=3.0)
    ours = lambda **call: nft_loss(ctx, batch, prepared, new_pred=v, metrics=Metrics(), **call)  # noqa: E731
    by_ref = ours(ref_pred=v_old)
    assert torch.equal(by_ref, ours(ref_pred=None, old_pred=v_old))
    ctx.args.diffusion_nft_adv_clip_max = 5.0
    assert not torch.equal(by_ref, ours(ref_pred=v_old))
    assert ours(ref_pred=None, write_old_log_prob=True) is None
    assert nft_loss.ref_mode == "ema" and nft_loss.requires_sample_aligned_windows
    with pytest.raises(ValueError, match="ref_pred: DiffusionNFT needs the old policy's velocity"):
        ours(ref_pred=None)
    ctx.args.diffusion_kl_beta = 0.1
    with pytest.raises(ValueError, match="--diffusion-kl-beta: nft_loss has no KL"):
        ours(ref_pred=v_old, old_pred=v_old)


@pytest.mark.parametrize(
    "name, change",
    {
        "--diffusion-nft-beta": lambda c, p: vars(c.args).update(diffusion_nft_beta=0.0),
        "--diffusion-adv-clip-max": lambda c, p: vars(c.args).update(diffusion_adv_clip_max=None),
        "prepared.extras: expected x0": lambda c, p: p.extras.clear(),
        "prepared.latents": lambda c, p: vars(p).update(latents=p.latents[:1]),
        "prepared.timesteps": lambda c, p: vars(p).update(timesteps=1000 * p.timesteps),
        "prepared.advantage": lambda c, p: vars(p).update(advantage=p.advantage[:, None]),
    }.items(),
)
def test_nft_says_what_is_off_in_miles_words(name, change):
    ctx, batch, prepared, v, v_old = nft_batch(diffusion_adv_clip_max=5.0)
    change(ctx, prepared)
    with pytest.raises(ValueError, match=f"^{name}"):
        nft_loss(ctx, batch, prepared, new_pred=v, ref_pred=v_old, metrics=Metrics())
