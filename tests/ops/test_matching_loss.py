"""The matching losses against their formulas, written out plainly and differentiated by autograd in
float64.
"""

import pytest
import torch

import flowkern as fk
from flowkern.ops._common import native
from flowkern.ops.matching_loss.api import LOSS
from flowkern.ops.matching_loss.inputs import MatchingInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LATENTS = ("velocity", "x0", "noise", "old_velocity", "velocity_ref", "velocity_ema")


def problem(
    batch=4, shape=(3, 8), objective="awm", drift=0.05, dtype=torch.float64, seed=0, anchors=True
):
    """Keywords of a call; drift 0: the old velocity is the velocity; None: there is none."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(batch, *shape, generator=g)  # noqa: E731
    old, step = draw(), draw()
    arguments = {
        "velocity": (old + (drift or 0) * step).to(dtype),
        "x0": draw().to(dtype),
        "sigma": torch.linspace(0.05, 0.95, batch),
        "advantage": torch.linspace(-1, 0.9, batch),
        "noise": draw().to(dtype),
        "objective": objective,
    }
    if drift is not None:
        arguments["old_velocity"] = old.to(dtype) if drift else arguments["velocity"]
    if anchors:
        arguments |= {"velocity_ref": draw().to(dtype), "velocity_ema": draw().to(dtype)}
        arguments |= {"ref_coef": 0.3, "ema_coef": 0.7}
    return arguments


def double(p):
    wide = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
    return {k: wide(v) for k, v in p.items()}


def gradient(p, weights=None, **options):
    """(result, gradient) of a call, with the velocity as a leaf."""
    velocity = p["velocity"].detach().clone().requires_grad_()
    out = fk.matching_loss(**p | {"velocity": velocity}, **options)
    (out.loss if weights is None else (weights * out.loss).sum()).backward()
    return out, velocity.grad


def mean(x):
    return x.flatten(1).mean(1)


def by_definition(p):
    """Loss of each sample and gradient of their mean, straight from the papers, in float64."""
    p = double(p)
    v = p["velocity"].clone().requires_grad_()
    row = p.get("row", torch.arange(len(p["velocity"])))
    old = p.get("old_velocity", v.detach())
    u, t, a = p["noise"] - p["x0"], p["sigma"], p["advantage"]
    if p["objective"] == "awm":
        high, low = p.get("clip_high", 1.0), p.get("clip_low", 1.0)

        def log_likelihood(velocity):
            m = mean((velocity[row] - u) ** 2)
            weighting, power = p.get("weighting", "ghuber"), p.get("ghuber_power", 0.25)
            if weighting == "ghuber":
                return -t / power * ((m + 1e-10) ** power - 1e-10**power)
            if weighting == "huber":
                return -t * ((m + 1e-10).sqrt() - 1e-5)
            return -(t ** {"uniform": 0, "t": 1, "t2": 2}[weighting]) * m

        ratio = (log_likelihood(v) - log_likelihood(old)).exp()
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    else:  # in the space of x0, as published, with its constant A_max = 5
        wide = t.reshape(-1, *[1] * (v.ndim - 1))
        x_t = (1 - wide) * p["x0"] + wide * p["noise"]
        r, b = (0.5 + a / 2).clamp(0, 1), p.get("nft_beta", 1.0)

        def normalized(velocity):
            error = x_t - wide * velocity - p["x0"]
            if p.get("weighting") == "uniform":
                return mean(error**2)
            return mean(error**2) / mean(error.detach().abs()).clamp(min=1e-5)

        towards, away = ((1 - b) * old + b * v)[row], ((1 + b) * old - b * v)[row]
        loss = 5 / b * (r * normalized(towards) + (1 - r) * normalized(away))
    for anchor, coefficient in (("velocity_ref", "ref_coef"), ("velocity_ema", "ema_coef")):
        if anchor in p:
            loss = loss + p[coefficient] * mean((v - p[anchor])[row] ** 2)
    loss.mean().backward()
    return loss.detach(), v.grad


AWM = [{"weighting": w} for w in ("uniform", "t", "ghuber", "huber", "t2")]
AWM += [{"weighting": "ghuber", "ghuber_power": p} for p in (0.01, 0.7)]
EACH = torch.linspace(0, 1, 12)  # a coefficient of its own for each sample
VARIANTS = [
    *[("awm", {"weighting": w}, d) for w in ("uniform", "t", "ghuber") for d in (0.3, None)],
    ("awm", {"clip_low": 0.02, "clip_high": 0.2}, 0.3),
    ("awm", {"weighting": "uniform", "clip_low": 0.01, "clip_high": 0.001}, 0.05),
    *[("nft", {}, d) for d in (0.3, 0, None)],
    *[("awm", {"weighting": w}, d) for w in ("t2", "huber") for d in (0.3, None)],
    *[("awm", {"ghuber_power": p}, d) for p in (0.1, 0.7) for d in (0.3, None)],
    *[("nft", {"nft_beta": 0.1}, d) for d in (0.3, 0, None)],
    ("nft", {"nft_beta": 1.5, "weighting": "uniform"}, 0.3),
    ("nft", {"weighting": "uniform"}, None),
]
ALL = [(*variant, has_anchors) for variant in VARIANTS for has_anchors in (True, False)]
ALL += [(o, {n: EACH for n in ("ref_coef", "ema_coef")}, 0.3, True) for o in ("awm", "nft")]


# ---- against the definitions ----


@pytest.mark.parametrize("objective, options, drift, anchors", ALL)
def test_value_and_gradient_are_those_of_the_formula(objective, options, drift, anchors):
    p = problem(batch=12, objective=objective, drift=drift, anchors=anchors) | options
    p = double(p)
    if objective == "nft":
        p["advantage"] = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64)  # r is cut at 0 and 1
    loss, expected = by_definition(p)
    out, got = gradient(p, reduction="mean")
    torch.testing.assert_close(out.loss, loss.mean())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(fk.matching_loss(**p, reduction="none").loss, loss)
    torch.testing.assert_close(fk.matching_loss(**p, reduction="sum").loss, loss.sum())
    assert not any(x.requires_grad for x in out[1:])


def test_statistics():
    p = double(problem(batch=12, drift=0.3) | {"clip_low": 0.02, "clip_high": 0.01})
    out = fk.matching_loss(**p, weighting="t")
    squares = [mean((p[n] - (p["noise"] - p["x0"])) ** 2) for n in ("velocity", "old_velocity")]
    torch.testing.assert_close(out.matching, squares[0])
    torch.testing.assert_close(out.log_ratio, -p["sigma"] * (squares[0] - squares[1]))
    torch.testing.assert_close(out.ratio, out.log_ratio.exp())
    for got, anchor in ((out.ref, "velocity_ref"), (out.ema, "velocity_ema")):
        torch.testing.assert_close(got, mean((p["velocity"] - p[anchor]) ** 2))
    a, r = p["advantage"], out.ratio
    assert torch.equal(out.clipped_low, (a < 0) & (r < 1 - 0.02)) and out.clipped_low.any()
    assert torch.equal(out.clipped_high, (a > 0) & (r > 1 + 0.01)) and out.clipped_high.any()
    assert not (out.clipped_low | out.clipped_high).all()
    free = fk.matching_loss(**p | {"velocity_ref": None, "ref_coef": 0.0, "objective": "nft"})
    assert (free.ref == 0).all() and (free.ratio == 1).all() and (free.log_ratio == 0).all()
    assert not (free.clipped_low | free.clipped_high).any()


# ---- laws ----


@pytest.mark.parametrize("old", ["none", "same"])
def test_first_step_of_nft_is_advantage_weighted_matching(old, backend):
    """At velocity == old_velocity: -A 2 t (u - v) / (D mean|u - v|), times 5: the published factor
    for advantages of which 5 is the largest, here divided by it.
    """
    p = problem(6, objective="nft", drift=0 if old == "same" else None, anchors=False)
    p = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in p.items()}
    _, got = gradient(p, reduction="none", weights=torch.ones(6), backend=backend)
    residual = p["noise"] - p["x0"] - p["velocity"]
    scale = -5 * p["advantage"] * 2 * p["sigma"] / (24 * mean(residual.abs()))
    torch.testing.assert_close(got, scale.reshape(-1, 1, 1) * residual, rtol=1e-5, atol=1e-8)
    p["advantage"] = torch.zeros(6)
    assert (gradient(p, backend=backend)[1].abs() <= 1e-8).all()


@pytest.mark.parametrize("options", AWM)
def test_off_policy_at_the_old_velocity_the_ratio_is_exactly_one(options, backend):
    for dtype in DTYPES:
        p = problem(drift=0, dtype=dtype, anchors=False) | options
        off, gradient_off = gradient(p, backend=backend)
        on, gradient_on = gradient(p | {"old_velocity": None}, backend=backend)
        assert (off.ratio == 1).all() and (on.ratio == 1).all() and (on.log_ratio == 0).all()
        assert torch.equal(off.loss, on.loss) and torch.equal(gradient_off, gradient_on)
        torch.testing.assert_close(on.loss, -p["advantage"].mean())
        assert (gradient_on != 0).any()
        tied = fk.matching_loss(**p, clip_low=0.0, clip_high=0.0, backend=backend)
        assert not (tied.clipped_low | tied.clipped_high).any()


@pytest.mark.parametrize("options", AWM[1:])
def test_difference_form_resolves_what_two_losses_cannot(options, backend):
    """M and M_old differ by 1e-6 of themselves, ten float32 steps."""
    p = problem(4, (64, 64), drift=None, dtype=torch.float32, anchors=False)
    u = p["noise"] - p["x0"]
    old = p["velocity"]
    p |= {"velocity": u + (old - u) * (1 + 5e-7), "old_velocity": old} | options
    truth = fk.matching_loss(**double(p)).log_ratio
    assert (1e-8 < truth.abs() / p["sigma"]).all() and (truth.abs() < 1e-5).all()
    ours = fk.matching_loss(**p, backend=backend).log_ratio
    assert ((ours - truth) / truth).abs().max() < 1e-4

    def log_likelihood(v):
        power = options.get("ghuber_power", {"huber": 0.5, "ghuber": 0.25}.get(p["weighting"], 1))
        return -p["sigma"] * (mean((v - u) ** 2) + 1e-10) ** power / power

    two = log_likelihood(p["velocity"]) - log_likelihood(old)
    assert ((two - truth) / truth).abs().max() > 100 * ((ours - truth) / truth).abs().max()


@pytest.mark.parametrize("options", AWM)
@pytest.mark.parametrize("right", ["old_velocity", "velocity"])
def test_an_old_velocity_that_is_right_is_no_danger(right, options, backend):
    """M_old, or M, is 0: the ratio needs it exactly, not as the other less the difference."""
    p = problem(4, (5, 1), drift=0.3, dtype=torch.float32, anchors=False) | options
    p |= {n: (p[n] * 256).round() / 256 for n in ("x0", "noise")}  # their difference is exact
    p[right] = p["noise"] - p["x0"]
    out, got = gradient(p, backend=backend)
    truth, true = gradient(double(p))
    torch.testing.assert_close(out.log_ratio.double(), truth.log_ratio, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", ["awm", "nft"])
def test_siblings_share_their_parents_velocity(objective, backend, poisoned_empty):
    """`row` equals repeating the parent; a row without samples has a gradient of 0."""
    row = torch.tensor([0, 2, 2, 4, 0, 2, 0])
    for shape in ((3, 8), (2, 1500)):
        p = problem(7, shape, objective, dtype=torch.float32)
        rows = {n: p[n][:5] for n in ("velocity", "old_velocity", "velocity_ref", "velocity_ema")}
        shared, got = gradient(p | rows | {"row": row}, backend=backend)
        repeated, copies = gradient(p | {n: x[row] for n, x in rows.items()}, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(shared, repeated, strict=True))
        expected = torch.zeros_like(got).index_add(0, row, copies)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
        assert (got[[1, 3]] == 0).all()
        _, true = by_definition(p | rows | {"row": row})
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_nft_beta_is_a_loss_of_mixed_velocities(beta, backend):
    """loss_b(velocity) is loss_1(old + b (velocity - old)) / b, so their gradients are one; where
    the velocity is the old one b is in the loss alone. The anchors see the velocity itself.
    """
    p = problem(6, (3, 700), "nft", drift=0.3, dtype=torch.float32)
    far = p["old_velocity"] + beta * (p["velocity"] - p["old_velocity"])
    anchors = {"ref_coef": 0.0, "ema_coef": 0.0}
    mixed, got = gradient(p | anchors | {"nft_beta": beta}, backend=backend)
    plain, expected = gradient(p | anchors | {"velocity": far}, backend=backend)
    torch.testing.assert_close(mixed.loss * beta, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(mixed.matching, plain.matching)
    pulled, _ = gradient(p | {"nft_beta": beta}, backend=backend)
    assert torch.equal(pulled.ref, gradient(p, backend=backend)[0].ref)
    p |= anchors | {"old_velocity": None}
    one, expected = gradient(p, backend=backend)
    other, got = gradient(p | {"nft_beta": beta}, backend=backend)
    torch.testing.assert_close(other.loss * beta, one.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", ["awm", "nft"])
def test_coefficients_of_each_sample(objective, backend):
    """(B,) that say one number are that number to the bit; else each is its own sample's."""
    p = problem(7, (3, 700), objective, dtype=torch.float32)
    row = torch.tensor([0, 2, 2, 4, 0, 2, 0])
    rows = {n: p[n][:5] for n in ("velocity", "old_velocity", "velocity_ref", "velocity_ema")}
    for change in ({"old_velocity": None}, rows | {"row": row}):
        p |= change
        each = {n: torch.full((7,), p[n]) for n in ("ref_coef", "ema_coef")}
        one = {n: float(x[0]) for n, x in each.items()}
        (number, expected), (same, got) = (gradient(p | x, backend=backend) for x in (one, each))
        assert all(torch.equal(x, y) for x, y in zip(number, same, strict=True))
        assert torch.equal(got, expected)
        each = {"ref_coef": torch.linspace(0, 1, 7), "ema_coef": torch.linspace(2, 0, 7)}
        out, got = gradient(p | each, reduction="none", weights=torch.ones(7), backend=backend)
        truth, true = gradient(double(p | each), reduction="none", weights=torch.ones(7))
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-7)


def test_only_the_velocity_has_a_gradient(backend):
    p = problem(dtype=torch.float32)
    leaves = {n: p[n].clone().requires_grad_() for n in (*LATENTS, "sigma", "advantage")}
    fk.matching_loss(**p | leaves, backend=backend).loss.backward()
    assert [n for n, x in leaves.items() if x.grad is not None] == ["velocity"]
    expected = leaves["velocity"].grad
    shared = p["velocity"].clone().requires_grad_()  # not detached: training must not stand still
    p |= {"velocity": shared, "old_velocity": shared, "velocity_ref": shared, "ema_coef": 0.0}
    fk.matching_loss(**p, backend=backend).loss.backward()
    assert (shared.grad != 0).any() and expected.shape == shared.shape


@pytest.mark.parametrize("objective", ["awm", "nft"])
def test_incoming_gradients_and_reductions(objective, backend):
    p = problem(5, objective=objective, dtype=torch.float32)
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    _, got = gradient(p, weights, reduction="none", backend=backend)
    each = [
        gradient(p, weights * torch.eye(5)[i], reduction="none", backend=backend)[1]
        for i in range(5)
    ]
    torch.testing.assert_close(got, sum(each))
    assert (got[1] == 0).all()
    total = gradient(p, reduction="sum", backend=backend)[1]
    torch.testing.assert_close(gradient(p, reduction="mean", backend=backend)[1] * 5, total)


# ---- the noise ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_added_noise_is_the_noise_of_the_loss(dtype, backend, poisoned_empty):
    for shape in ((3, 8), (2, 1027)):
        p = problem(4, shape, dtype=dtype)
        key = {"seed": 7, "sample_id": torch.arange(4) + 2**33, "step": 5}
        e = fk.philox_normal((4, *shape), **key, stream="match", backend="reference")
        sigma = torch.tensor([0.0, 0.3, 0.7, 1.0])
        t = sigma.reshape(-1, *[1] * len(shape))
        x_t = fk.add_noise(p["x0"], sigma, **key, backend=backend)
        assert x_t.dtype == dtype
        assert torch.equal(x_t, ((1 - t) * p["x0"].float() + t * e).to(dtype))
        assert torch.equal(x_t, fk.add_noise(p["x0"], sigma, noise=e, backend=backend))
        assert torch.equal(x_t[0], p["x0"][0]) and torch.equal(x_t[3], e[3].to(dtype))
        alone = {"seed": 7, "sample_id": key["sample_id"][2:3], "step": torch.tensor([5])}
        assert torch.equal(x_t[2:3], fk.add_noise(p["x0"][2:3], 0.7, **alone, backend=backend))
        for objective in ("awm", "nft"):
            p["objective"] = objective
            given = gradient(p | {"noise": e}, backend=backend)
            drawn = gradient(p | {"noise": None} | key, backend=backend)
            assert all(torch.equal(x, y) for x, y in zip(given[0], drawn[0], strict=True))
            assert torch.equal(given[1], drawn[1])


@pytest.mark.parametrize("objective", ["awm", "nft"])
def test_both_ends_of_the_path(objective, backend):
    p = problem(4, objective=objective, dtype=torch.float32)
    for sigma in (0.0, 1.0, 0, 1):
        out, got = gradient(p | {"sigma": sigma}, backend=backend)
        truth, true = gradient(double(p | {"sigma": sigma}))
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-7)
    clean = p | {"sigma": 0.0, "ref_coef": 0.0, "ema_coef": 0.0}
    assert (gradient(clean, backend=backend)[1] == 0).all()


def test_the_weights_of_nft_have_a_floor(backend):
    """sigma mean|residual| below 1e-5 counts as 1e-5, and just above as itself."""
    p = problem(4, objective="nft", dtype=torch.float32, anchors=False)
    size = mean((p["noise"] - p["x0"] - p["velocity"]).abs())
    p["sigma"] = torch.tensor([1e-6, 3e-6, 2e-5, 1e-4]) / size
    loss, true = by_definition(double(p))
    out, got = gradient(p, reduction="mean", backend=backend)
    torch.testing.assert_close(out.loss.double(), loss.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6 * float(true.abs().max()))


# ---- layouts, threads, instruction sets, compilers ----


@pytest.mark.parametrize("objective", ["awm", "nft"])
def test_any_layout_and_mixed_dtypes(objective, backend):
    p = problem(3, (4, 6, 5), objective, dtype=torch.float32)
    dtypes = (torch.bfloat16, torch.float32, torch.float16, *[torch.bfloat16] * 3)
    p |= {n: p[n].to(d) for n, d in zip(LATENTS, dtypes, strict=True)}
    expected = gradient(p, backend=backend)
    layouts = (
        lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
        lambda x: torch.stack([x, x], dim=1)[:, 0],
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
    )
    for layout in layouts:
        strided = p | {n: layout(p[n]) for n in LATENTS}
        strided |= {n: torch.stack([p[n], p[n]], dim=1)[:, 0] for n in ("sigma", "advantage")}
        out, got = gradient(strided, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(out, expected[0], strict=True))
        assert torch.equal(got, expected[1])
    same = p | {n: p[n][:1].expand(3, 4, 6, 5) for n in LATENTS}
    loss, _ = by_definition(same)
    out = fk.matching_loss(**same, reduction="none", backend=backend)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)


def test_opcheck():
    if native.cpu() is None:
        pytest.skip(native.why_not())
    p = problem(3, (4, 33), "nft", dtype=torch.float32)
    v, row = p["velocity"].requires_grad_(), torch.tensor([0, 2, 2])
    anchors = (p["old_velocity"], p["velocity_ref"], p["velocity_ema"])
    ops = torch.ops.flowkern
    of_samples = (v, p["x0"], p["sigma"], p["advantage"], row)
    ids = torch.arange(3)
    for objective, source in (
        ("awm", (p["noise"], None, None, None)),
        ("nft", (None, 3, ids, ids + 1)),
        (None, (None, 3, ids, 2)),  # of a step for all: add_noise alone
    ):
        given, _, ids_of, step = source
        key = (None, 3, step) if isinstance(step, int) else (step, 3, 0)
        torch.library.opcheck(ops.add_noise, (p["x0"], p["sigma"], given, ids_of, *key, "native"))
        if objective is None:
            continue
        coefficients = (p["sigma"], 0.7, 0.1, 0.1, "mean")
        how = ("ghuber", 0.5, 1.0) if objective == "awm" else ("adaptive", 0.25, 0.5)
        inputs = MatchingInputs(*of_samples, *source, objective, *how, *anchors, *coefficients)
        call = LOSS.op_arguments(inputs, "native")
        torch.library.opcheck(ops.matching_loss, call)
        slopes = ops.matching_loss(*call)[-1].detach()
        tensors, settings = LOSS.keep(inputs._replace(velocity=v.detach()))
        call = (torch.ones(()), slopes, *tensors, *settings, "native")
        torch.library.opcheck(ops.matching_loss_backward, call)


@pytest.mark.parametrize("objective", ["awm", "nft"])
def test_compiles_whole_forward_and_backward(objective, backend):
    p = problem(3, (4, 33), objective, dtype=torch.float32)
    del p["noise"]

    def train(v, x0, sigma, ids):
        source = {"seed": 5, "sample_id": ids}
        if backend == "reference":  # its Philox is traced with a step: it takes long
            source = {"noise": fk.philox_normal(x0.shape, **source, step=0, stream="match")}
        x_t = fk.add_noise(x0, sigma, **source, backend=backend)
        changes = {"velocity": v * 1.0, "x0": x0, "sigma": sigma}
        return x_t, fk.matching_loss(**p | changes, **source, backend=backend)

    results = []
    for run in (train, torch.compile(train, fullgraph=True, backend="aot_eager")):
        v = p["velocity"].clone().requires_grad_()
        x_t, out = run(v, p["x0"], p["sigma"], torch.arange(3))
        out.loss.backward()
        assert not any(x.requires_grad for x in out[1:])
        results.append((x_t, *[x.detach() for x in out], v.grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_the_loss_keeps_nothing_of_size_d_but_its_inputs():
    p = problem(3, (4, 33), dtype=torch.float32)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    velocity = p["velocity"].requires_grad_()
    with hooks:
        fk.matching_loss(**p, backend="native" if native.cpu() else "reference")
    if native.cpu():
        inputs = {p[n].data_ptr() for n in LATENTS}
        large = [x.data_ptr() for x in saved if x.numel() > 3 * 4]
        assert velocity.data_ptr() in large and set(large) <= inputs
        assert p["old_velocity"].data_ptr() not in large  # awm's gradient does not read it


# ---- edges ----


def test_nothing_to_do(backend, poisoned_empty):
    for objective in ("awm", "nft"):
        p = problem(3, objective=objective, dtype=torch.float32)
        empty = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in p.items()}
        for reduction in ("mean", "sum"):
            out, got = gradient(empty, reduction=reduction, backend=backend)
            assert out.loss == 0 and got.shape == (0, 3, 8) and out.ratio.shape == (0,)
        flat = p | {n: p[n][:, :0] for n in LATENTS}
        out, got = gradient(flat, backend=backend)
        torch.testing.assert_close(
            out.loss, -p["advantage"].mean() if objective == "awm" else torch.tensor(0.0)
        )
        assert got.shape == (3, 0, 8) and (out.matching == 0).all()
    assert fk.add_noise(torch.empty(0, 4), 0.5, noise=torch.empty(0, 4)).shape == (0, 4)


def test_rows_without_samples(backend, poisoned_empty):
    p = problem(3, dtype=torch.float32)
    none = {k: v[:0] for k, v in p.items() if k in ("x0", "sigma", "advantage", "noise")}
    _, got = gradient(p | none | {"row": torch.empty(0, dtype=torch.int64)}, backend=backend)
    assert got.shape == (3, 3, 8) and (got == 0).all()


def test_clipped_samples_have_no_gradient(backend):
    p = problem(4, drift=0.5, dtype=torch.float32, anchors=False)
    p |= {"clip_low": 1e-6, "clip_high": 1e-6}
    out, got = gradient(p, backend=backend)
    clipped = out.clipped_low | out.clipped_high
    assert clipped.any() and (got[clipped] == 0).all() and (got[~clipped] != 0).all()


def test_clipped_samples_are_not_read_backward():
    """NaN poisons their data between forward and backward."""
    if native.cpu() is None:
        pytest.skip(native.why_not())
    p = problem(4, drift=0.5, dtype=torch.float32, anchors=False)
    velocity = p["velocity"].detach().clone().requires_grad_()
    p |= {"clip_low": 1e-6, "clip_high": 1e-6, "velocity": velocity}
    out = fk.matching_loss(**p, backend="native")
    clipped = out.clipped_low | out.clipped_high
    for name in ("x0", "noise"):
        p[name].data[clipped] = torch.nan  # .data: autograd does not notice
    out.loss.backward()
    assert (velocity.grad[clipped] == 0).all() and velocity.grad.isfinite().all()
    assert 0 < clipped.sum() < 4 and (velocity.grad[~clipped] != 0).all()


@pytest.mark.parametrize("objective", ["awm", "nft"])
@pytest.mark.parametrize("name", LATENTS)
def test_nan_poisons_its_own_sample(objective, name, backend):
    p = problem(3, (5, 700), objective, dtype=torch.float32)
    p["advantage"] = torch.tensor([0.5, 0.5, 0.5])
    p[name][1, 2, 3] = float("nan")
    for drift in (True, False):
        if not drift and name != "old_velocity":
            p.pop("old_velocity", None)
        out = fk.matching_loss(**p, reduction="none", backend=backend)
        assert out.loss.isnan().tolist() == [False, True, False]


def test_errors_name_the_argument():
    good = problem(3, dtype=torch.float32)
    half, nan = torch.zeros(3, 2, 8), float("nan")
    key = {"noise": None, "seed": 1, "sample_id": torch.arange(3)}
    nft, huber, each = {"objective": "nft"}, {"weighting": "huber"}, torch.ones(3)
    cases = [
        ({"velocity": [1.0]}, TypeError, "velocity: expected a tensor, got list"),
        ({"x0": half}, ValueError, r"x0: expected shape \(3, 3, 8\), got \(3, 2, 8\)"),
        ({"x0": good["x0"][:2]}, ValueError, "x0: expected shape"),
        ({"x0": good["x0"].long()}, TypeError, "x0: expected float32.*torch.int64"),
        ({"noise": half}, ValueError, "noise: expected shape"),
        ({"noise": good["noise"].to("meta")}, ValueError, "noise: expected device cpu, got meta"),
        ({"old_velocity": half}, ValueError, "old_velocity: expected shape"),
        ({"velocity_ref": half}, ValueError, "velocity_ref: expected shape"),
        ({"velocity_ema": half}, ValueError, "velocity_ema: expected shape"),
        ({"sigma": 1.5}, ValueError, r"sigma: expected a number in \[0, 1\] or \(B,\), got 1.5"),
        ({"sigma": nan}, ValueError, "sigma: expected a number"),
        ({"sigma": "high"}, ValueError, "sigma: expected a number"),
        ({"sigma": torch.ones(2)}, ValueError, r"sigma: expected shape \(3,\), got \(2,\)"),
        ({"sigma": torch.tensor(1.5)}, ValueError, "sigma: expected values in"),
        ({"sigma": torch.ones(3).long()}, TypeError, "sigma: expected a floating-point"),
        ({"sigma": torch.tensor([0.1, 0.2, 1.1])}, ValueError, r"sigma: expected values in \[0, 1"),
        ({"sigma": torch.tensor([0.1, nan, 1.0])}, ValueError, "sigma: expected values in"),
        ({"advantage": torch.ones(2)}, ValueError, "advantage: expected shape"),
        ({"advantage": 1.0}, TypeError, "advantage: expected a tensor, got float"),
        ({"row": torch.tensor([0, 1, 3])}, IndexError, r"row: expected values in \[0, 3\)"),
        ({"row": torch.ones(3)}, TypeError, "row: expected an integer tensor"),
        ({"noise": None}, ValueError, "seed: got None; expected noise, or all of"),
        ({"seed": 1}, ValueError, "noise: given together with"),
        ({"step": 4}, ValueError, "noise: given together with"),
        (key | {"step": None}, ValueError, "step: got None"),
        (key | {"sample_id": torch.arange(2)}, ValueError, "sample_id: expected shape"),
        ({"objective": "dpo"}, ValueError, "objective: expected 'awm' or 'nft', got 'dpo'"),
        ({"weighting": "t3"}, ValueError, "weighting: expected one of .*'ghuber'.*got 't3'"),
        ({"weighting": "adaptive"}, ValueError, "of objective='awm', got 'adaptive'"),
        (nft | {"weighting": "ghuber"}, ValueError, "of objective='nft', got 'ghuber'"),
        ({"ghuber_power": 0.0}, ValueError, r"ghuber_power: expected a number in \[0.01, 1\], got"),
        (huber | {"ghuber_power": 0.5}, ValueError, "0.5 is of weighting='ghuber', got 'huber'"),
        (nft | {"ghuber_power": 0.5}, ValueError, "0.5 is of weighting='ghuber', got 'adaptive'"),
        (nft | {"nft_beta": 0.0}, ValueError, "nft_beta: expected a finite number > 0, got 0.0"),
        (nft | {"nft_beta": nan}, ValueError, "nft_beta: expected a finite number > 0, got nan"),
        ({"nft_beta": 0.5}, ValueError, "nft_beta: 0.5 is of objective='nft', got 'awm'"),
        ({"ref_coef": torch.ones(2)}, ValueError, r"ref_coef: expected shape \(3,\), got \(2,\)"),
        ({"ref_coef": each, "velocity_ref": None}, ValueError, r"needed for ref_coef=\(B,\), got"),
        ({"reduction": "max"}, ValueError, "reduction: expected"),
        ({"clip_low": 1.1}, ValueError, "clip_low: expected 0 <= clip_low <= 1, got 1.1"),
        ({"clip_low": -0.1}, ValueError, "clip_low: expected"),
        ({"clip_high": -0.1}, ValueError, "clip_high: expected a number >= 0"),
        ({"clip_high": nan}, ValueError, "clip_high: expected"),
        ({"ref_coef": -1.0}, ValueError, "ref_coef: expected a finite number >= 0"),
        ({"ema_coef": float("inf")}, ValueError, "ema_coef: expected a finite number >= 0"),
        ({"velocity_ref": None}, ValueError, "velocity_ref: needed for ref_coef=0.3, got None"),
        ({"velocity_ema": None}, ValueError, "velocity_ema: needed for ema_coef=0.7, got None"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            fk.matching_loss(**good | change)
    with pytest.raises(fk.BackendError, match="backend='native' cannot serve torch.float64"):
        fk.matching_loss(**double(good), backend="native")
    with pytest.raises(ValueError, match="sigma: expected shape"):
        fk.add_noise(good["x0"], torch.ones(2), noise=good["noise"])
    with pytest.raises(ValueError, match="seed: got None"):
        fk.add_noise(good["x0"], 0.5)


def test_a_row_out_of_range_never_reaches_memory():
    """The op itself, past the checks of the verb."""
    if native.cpu() is None:
        pytest.skip(native.why_not())
    x, a = torch.zeros(2, 8), torch.zeros(2)
    row, none = torch.tensor([0, 2]), (None,) * 3
    inputs = MatchingInputs(
        x, x, a, a, row, x, *none, "awm", "ghuber", 0.25, 1.0, *none, 0.0, 0.0, 1.0, 1.0, "mean"
    )
    with pytest.raises(IndexError, match=r"row: expected values in \[0, 2\), got 2"):
        torch.ops.flowkern.matching_loss(*LOSS.op_arguments(inputs, "native"))
