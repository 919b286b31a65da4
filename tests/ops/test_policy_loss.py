"""The policy loss of every backend against its formulas, written out plainly and differentiated by
autograd in float64. test_policy_loss_kernel.py has the contract of the kernels.
"""

import math

import pytest
import torch

import flowkern as fk
from flowkern.schedules import sd3_sigmas, step_coefficients

GRID = sd3_sigmas(10)
DTYPE = {"reference": torch.float64, "native": torch.float32}  # what a backend is tested in
# Of values, against float64 arithmetic on the same inputs.
CLOSE = {"reference": {"rtol": 1e-9, "atol": 1e-15}, "native": {"rtol": 3e-5, "atol": 3e-7}}


def problem(batch=6, shape=(3, 8), kind="flow_sde", drift=0.05, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    rows = step_coefficients(GRID, kind, 0.7)[torch.arange(batch) % 9]
    x_t, old, velocity = draw(batch, *shape), draw(batch, *shape), draw(batch, *shape)
    noise = draw(batch, *shape)
    x_next, _ = fk.sde_step(x_t, old, rows, noise=noise, backend="reference")
    return {
        "velocity": (old + drift * velocity).requires_grad_(),
        "x_t": x_t,
        "x_next": x_next,
        "c_rows": rows,
        "advantage": draw(batch),
        "old_velocity": old,
    }, noise


def double(p):
    """The same problem, in float64."""
    wide = lambda v: v.detach().double() if isinstance(v, torch.Tensor) else v  # noqa: E731
    p = {k: v if k == "row" else wide(v) for k, v in p.items()}
    return p | {"velocity": p["velocity"].requires_grad_()}


def gaussian_log_prob(p, velocity):
    """log N(x_next; mean, std^2), a mean over elements, straight from the definition."""
    shape = (-1, *[1] * (p["x_t"].ndim - 1))
    c = p["c_rows"]
    mean = c.a.reshape(shape) * p["x_t"] + c.b.reshape(shape) * velocity
    std = c.std.reshape(shape)
    return (
        (-((p["x_next"] - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi))
        .flatten(1)
        .mean(1)
    )


def test_value_gradient_and_statistics_are_those_of_the_formula(backend):
    p, _ = problem(batch=18, drift=0.4, dtype=DTYPE[backend])
    clip_low, clip_high, weight = 1e-3, 4e-3, torch.linspace(0.5, 2, 18)
    out = fk.policy_loss(
        **p, clip_low=clip_low, clip_high=clip_high, step_weight=weight, backend=backend
    )
    (gradient,) = torch.autograd.grad(out.loss, p["velocity"])

    p = double(p)
    log_ratio = gaussian_log_prob(p, p["velocity"]) - gaussian_log_prob(p, p["old_velocity"])
    r, a = log_ratio.exp(), p["advantage"]
    policy = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
    loss = (weight * policy).mean()
    (expected,) = torch.autograd.grad(loss, p["velocity"])
    close = lambda x, y: torch.testing.assert_close(x.double(), y, **CLOSE[backend])  # noqa: E731
    close(out.loss, loss)
    close(gradient, expected)
    close(out.log_ratio, log_ratio.detach())
    close(out.ratio, r.detach())
    assert torch.equal(out.clipped_high, (a > 0) & (r > 1 + clip_high))
    assert torch.equal(out.clipped_low, (a < 0) & (r < 1 - clip_low))
    clipped = out.clipped_high | out.clipped_low
    assert out.clipped_high.any() and out.clipped_low.any() and not clipped.all()
    assert (gradient[clipped] == 0).all()


def test_on_policy_ratio_is_exactly_one_and_keeps_its_gradient(backend):
    for dtype in (torch.float32, torch.bfloat16):
        p, _ = problem(dtype=dtype, drift=0.0)
        p |= {"x_next": p["x_next"].detach(), "velocity": p["velocity"].detach().requires_grad_()}
        for ratio in ("sde", "guard"):
            gradients = []
            for old in (None, p["velocity"].detach()):
                out = fk.policy_loss(**p | {"old_velocity": old}, ratio=ratio, backend=backend)
                assert (out.ratio == 1).all() and (out.log_ratio == 0).all()
                torch.testing.assert_close(out.loss, -p["advantage"].float().mean())
                gradients.append(torch.autograd.grad(out.loss, p["velocity"])[0])
            assert torch.equal(*gradients) and (gradients[0] != 0).any()


def test_difference_form_is_exact_where_float32_log_probs_are_not(backend):
    """A drift that moves the ratio by 1e-7: the difference of two float32 log-probabilities cannot
    resolve it.
    """
    p, _ = problem(batch=9, shape=(64, 64), dtype=torch.float32, drift=2e-6)
    p["velocity"] = p["velocity"].detach()
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in p.items()}
    truth = gaussian_log_prob(wide, wide["velocity"]) - gaussian_log_prob(
        wide, wide["old_velocity"]
    )
    ours = fk.policy_loss(**p, backend=backend).log_ratio
    old_log_prob = fk.sde_log_prob(
        p["x_t"], p["old_velocity"], p["x_next"], p["c_rows"], backend=backend
    )
    recorded = fk.policy_loss(
        **p | {"old_velocity": None}, old_log_prob=old_log_prob, backend=backend
    ).log_ratio
    assert (
        (ours - truth) / truth
    ).abs().max() < 0.03  # of the drift itself, which is 17 steps of the velocity's float32
    assert (recorded - truth).abs().max() < 1e-6 < 100 * truth.abs().max()
    assert (recorded - truth).abs().mean() > 10 * (ours - truth).abs().mean()


@pytest.mark.parametrize("kind", ["cps", "dance_sde", "dpm_sde"])
def test_other_samplers_share_the_formula(kind, backend):
    p, _ = problem(kind=kind, drift=0.3, dtype=DTYPE[backend])
    ours = fk.policy_loss(**p, backend=backend).log_ratio
    p = double(p)
    log_prob = [
        fk.sde_log_prob(p["x_t"], v, p["x_next"], p["c_rows"])
        for v in (p["velocity"], p["old_velocity"])
    ]
    torch.testing.assert_close(
        ours.double(), (log_prob[0] - log_prob[1]).detach(), **CLOSE[backend]
    )


def test_guard_is_the_noise_times_the_drift(backend):
    p, noise = problem(drift=0.3, dtype=DTYPE[backend])
    drift = p["c_rows"].b.reshape(-1, 1, 1) * (p["velocity"] - p["old_velocity"]).detach()
    out = fk.policy_loss(**p, ratio="guard", backend=backend)
    torch.testing.assert_close(
        out.log_ratio.double(), (noise * drift).double().flatten(1).mean(1), **CLOSE[backend]
    )


def test_kl_is_that_of_two_gaussians_and_is_never_step_weighted(backend):
    p, _ = problem(drift=0.3, dtype=DTYPE[backend])
    reference = (p["old_velocity"] * 1.1).detach()
    coefficient = torch.linspace(0, 1, 6)
    common = {"reduction": "none", "step_weight": torch.full((6,), 3.0), "backend": backend}
    plain = fk.policy_loss(**p, **common)
    out = fk.policy_loss(**p, velocity_ref=reference, kl_coef=coefficient, **common)
    total, policy = (torch.autograd.grad(x.loss.sum(), p["velocity"])[0] for x in (out, plain))

    p = double(p)
    c = p["c_rows"]
    means = [
        c.a.reshape(-1, 1, 1) * p["x_t"] + c.b.reshape(-1, 1, 1) * v
        for v in (p["velocity"], reference.double())
    ]
    gaussians = [torch.distributions.Normal(m, c.std.reshape(-1, 1, 1)) for m in means]
    kl = torch.distributions.kl_divergence(*gaussians).flatten(1).mean(1)
    close = lambda x, y: torch.testing.assert_close(x.double(), y, **CLOSE[backend])  # noqa: E731
    close(out.kl, kl.detach())
    close(out.loss, (plain.loss.double() + coefficient * kl).detach())
    (expected,) = torch.autograd.grad((coefficient * kl).sum(), p["velocity"])
    close(total, policy.double() + expected)


def test_siblings_share_their_parents_velocity(backend):
    """`row` equals repeating the parent, in value and in gradient."""
    p, _ = problem(batch=7, dtype=DTYPE[backend])
    row = torch.tensor([0, 2, 2, 1, 0, 2, 0])
    velocity, x_t, old = (p[n].detach()[:3] for n in ("velocity", "x_t", "old_velocity"))
    shared = p | {
        "velocity": velocity.clone().requires_grad_(),
        "x_t": x_t,
        "old_velocity": old,
        "row": row,
        "backend": backend,
    }
    copies = p | {
        "velocity": velocity[row].requires_grad_(),
        "x_t": x_t[row],
        "old_velocity": old[row],
        "backend": backend,
    }
    out, repeated = fk.policy_loss(**shared), fk.policy_loss(**copies)
    assert all(torch.equal(x, y) for x, y in zip(out, repeated, strict=True))
    out.loss.backward()
    repeated.loss.backward()
    expected = torch.zeros_like(velocity).index_add(0, row, copies["velocity"].grad)
    torch.testing.assert_close(shared["velocity"].grad, expected)


def test_guidance_reaches_the_conditional_velocity_only(backend):
    p, _ = problem(dtype=DTYPE[backend])
    uncond = torch.randn_like(p["x_t"]).requires_grad_()
    guided = (uncond + 4.5 * (p["velocity"] - uncond)).detach().requires_grad_()
    out = fk.policy_loss(**p, velocity_uncond=uncond, guidance_scale=4.5, backend=backend)
    plain = fk.policy_loss(**p | {"velocity": guided}, backend=backend)
    torch.testing.assert_close(out.log_ratio, plain.log_ratio)
    out.loss.backward()
    plain.loss.backward()
    torch.testing.assert_close(p["velocity"].grad, 4.5 * guided.grad)
    assert uncond.grad is None


@pytest.mark.parametrize("ratio", ["sde", "guard"])
def test_x_next_is_drawn_again_from_its_seed(ratio, backend):
    p, _ = problem(dtype=torch.float32)
    key = {"seed": 11, "sample_id": torch.arange(6) + 100, "step": torch.arange(6)}
    x_next, _ = fk.sde_step(p["x_t"], p["old_velocity"], p["c_rows"], **key)
    noise = fk.philox_normal(x_next.shape, **key)
    common = {"ratio": ratio, "backend": backend}
    results = []
    for source in ({"x_next": x_next}, {"x_next": None} | key, {"x_next": None, "noise": noise}):
        out = fk.policy_loss(**p | source, **common)
        results.append([*out, *torch.autograd.grad(out.loss, p["velocity"])])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_ties_keep_the_gradient(backend):
    """With a clip range of 0 an on-policy sample sits on both bounds: nothing is clipped."""
    p, _ = problem(drift=0.0, dtype=DTYPE[backend])
    p["velocity"] = p["old_velocity"].clone().requires_grad_()
    out = fk.policy_loss(**p, clip_low=0.0, clip_high=0.0, backend=backend)
    assert not (out.clipped_low | out.clipped_high).any() and (out.ratio == 1).all()
    out.loss.backward()
    assert (p["velocity"].grad != 0).flatten(1).any(1).all()


def test_reductions_empty_batch_and_float32(backend):
    p, _ = problem(dtype=DTYPE[backend])
    p["backend"] = backend
    none, total, mean = (fk.policy_loss(**p, reduction=r).loss for r in ("none", "sum", "mean"))
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(none.mean(), mean)
    assert none.shape == (6,) and total.shape == mean.shape == ()
    empty = {k: v if k == "backend" else v[:0] for k, v in p.items()}
    assert fk.policy_loss(**empty, reduction="sum").loss == 0
    assert fk.policy_loss(**empty, reduction="none").loss.shape == (0,)
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in p.items()}
    torch.testing.assert_close(
        fk.policy_loss(**single).loss.double(),
        fk.policy_loss(**double(p) | {"backend": "reference"}).loss,
        rtol=1e-5,
        atol=1e-6,
    )


def test_compiles_whole(backend):
    p, _ = problem(dtype=torch.float32)
    drawn = {"seed": 3, "sample_id": torch.arange(6), "step": 2}
    if backend == "reference":  # Philox is traced with matching_loss: it takes long
        drawn = {"noise": fk.philox_normal(p["x_next"].shape, **drawn)}
    reference = p["old_velocity"] * 1.1

    def run(velocity, advantage, x_next, ratio, **more):
        return fk.policy_loss(
            **p | {"velocity": velocity, "advantage": advantage, "x_next": x_next},
            ratio=ratio,
            velocity_ref=reference,
            kl_coef=0.1,
            backend=backend,
            **more,
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ratio, more in (("sde", {}), ("guard", drawn)):
        x_next = None if more else p["x_next"]
        results = []
        for call in (run, compiled):
            out = call(p["velocity"], p["advantage"], x_next, ratio, **more)
            assert not any(x.requires_grad for x in out[1:])
            results.append([*out, *torch.autograd.grad(out.loss, p["velocity"])])
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)


def test_errors_name_the_argument():
    good, noise = problem(batch=4)
    old_log_prob = torch.zeros(4)
    cases = [
        (
            {"x_next": noise[:, :2]},
            ValueError,
            r"x_next: expected shape \(4, 3, 8\), got \(4, 2, 8\)",
        ),
        ({"advantage": torch.ones(3)}, ValueError, r"advantage: expected shape \(4,\), got \(3,\)"),
        ({"advantage": torch.ones(4, 1)}, ValueError, "advantage: expected shape"),
        (
            {"row": torch.tensor([0, 1, 2, 4])},
            IndexError,
            r"row: expected values in \[0, 4\), got 0 to 4",
        ),
        ({"row": torch.tensor([0.0] * 4)}, TypeError, "row: expected an integer tensor"),
        ({"old_velocity": noise[:2]}, ValueError, "old_velocity: expected shape"),
        (
            {"old_log_prob": old_log_prob},
            ValueError,
            "old_log_prob: given together with old_velocity",
        ),
        (
            {"old_velocity": None, "old_log_prob": old_log_prob, "ratio": "guard"},
            ValueError,
            "old_log_prob: ratio='guard'",
        ),
        ({"kl_coef": 0.1}, ValueError, "velocity_ref: needed for a KL"),
        ({"ratio": "ppo"}, ValueError, "ratio: expected"),
        ({"reduction": "max"}, ValueError, "reduction: expected"),
        ({"clip_low": 1.0}, ValueError, "clip_low: expected"),
        ({"clip_high": -0.1}, ValueError, "clip_high: expected"),
        ({"guidance_scale": 3.0}, ValueError, "velocity_uncond: needed"),
        ({"x_next": None, "old_velocity": None}, ValueError, "old_velocity: needed to draw"),
        ({"x_next": None}, ValueError, "seed: got None; expected noise, or all of"),
        ({"seed": 1}, ValueError, "seed: given together with x_next"),
        ({"step_weight": torch.ones(2)}, ValueError, "step_weight: expected shape"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            fk.policy_loss(**good | change)
    half = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in good.items()}
    with pytest.raises(TypeError, match="x_next: only float32 states can be drawn again"):
        fk.policy_loss(**half | {"x_next": None}, noise=noise)
