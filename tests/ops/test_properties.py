"""Laws of the ops, for whatever arguments hypothesis finds.

The arguments are those of tests/fuzz, with hypothesis choosing instead of a seed.
"""

import fuzz
import pytest
import torch
from fuzz import WEIGHTS, Draw

import flowkern as fk
from flowkern.schedules import Coefficients, sd3_sigmas, step_coefficients

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

BACKENDS = [name for name in ("native", "reference") if fk.backends()[name] is None]
needs_kernels = pytest.mark.skipif("native" not in BACKENDS, reason=str(fk.backends()["native"]))
chance = st.randoms(use_true_random=False)
backends = st.sampled_from(BACKENDS)


def law(examples, **strategies):
    """A test of a law: the same examples every time; the fuzzer is what varies."""
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: settings(hypothesis.given(**strategies)(test))


def calm(r) -> Draw:
    """Arguments near 1, where laws of arithmetic are told apart from overflow."""
    draw = Draw(r)
    draw.is_wild, draw.odd = False, ()
    return draw


def same(x, y) -> bool:
    return torch.equal(x, y) or torch.equal(x.nan_to_num(nan=7e37), y.nan_to_num(nan=7e37))


def verb(p):
    return {n: v for n, v in p.items() if n != WEIGHTS}


def picked(p, index):
    """The samples `index` of a call; velocity rows stay."""
    batch = len(p["advantage"])
    rows = ("velocity", "x_t", "old_velocity", "velocity_ref", "velocity_ema", "velocity_uncond")
    part = {"row": p["row"][index]} if "row" in p else {}
    for name, x in p.items():
        is_per_sample = isinstance(x, torch.Tensor) and x.ndim and len(x) == batch
        if name == "c_rows":
            part[name] = x if x.table.ndim == 1 else x[index]
        elif name != "row":
            stays = "row" in p and name in rows
            part[name] = x[index] if is_per_sample and not stays else x
    return part


@pytest.mark.parametrize("op", fuzz.OPS, ids=lambda op: op.name)
def test_every_call_is_within_its_bound(op):
    """Any shape, stride, dtype, magnitude, edge; against float64, on every backend."""

    @law(40, r=chance, backend=backends)
    def holds(r, backend):
        fuzz.check_drawn(op, Draw(r), backend)

    holds()


# ---- the step ----


@law(60, r=chance, backend=backends)
def test_a_replay_is_the_draw_bit_for_bit_in_any_batch(r, backend):
    draw = Draw(r)
    p = draw.step(history=False)
    x_next, drawn = fk.sde_step(**p, **draw.noise(p["x_t"].shape), backend=backend)
    batch = len(x_next)
    order = torch.tensor(r.sample(range(batch), batch), dtype=torch.int64)
    for index in order.split(r.randint(1, max(1, batch))):
        part = {n: v[index] if isinstance(v, torch.Tensor) else v for n, v in p.items()}
        if p["c_rows"].table.ndim == 2:
            part["c_rows"] = p["c_rows"][index]
        replayed = fk.sde_log_prob(**part, x_next=x_next[index], backend=backend)
        assert same(replayed, drawn[index])


@law(40, r=chance, backend=backends)
def test_std_zero_is_euler_exactly(r, backend):
    draw = Draw(r)
    shape = draw.shape()
    x, v = draw.latent(shape, dtype=torch.float32), draw.latent(shape, dtype=torch.float32)
    grid = sd3_sigmas(10)
    i = torch.randint(0, 10, (shape[0],), generator=draw.g)
    rows = step_coefficients(grid, "ode", 0.0)[i]
    euler = x + grid.diff()[i].float().reshape(-1, *[1] * (x.ndim - 1)) * v
    nan = torch.full(shape, torch.nan)
    for noise in ({"noise": nan}, draw.key(shape[0])):
        x_next, log_prob = fk.sde_step(x, v, rows, **noise, backend=backend)
        assert same(x_next, euler)
        assert (log_prob[euler.flatten(1).isfinite().all(1)] == 0).all()


@law(30, r=chance, backend=backends)
def test_guidance_of_nothing_is_no_guidance(r, backend):
    """u + 1 (v - u) with u = 0 is v; and scale 0 is u, for any v that is finite."""
    draw = calm(r)
    p = draw.step(history=False) | draw.noise((0, 1))
    p = {n: p[n] for n in ("x_t", "velocity", "c_rows")} | draw.noise(p["x_t"].shape)
    x_next, log_prob = fk.sde_step(**p, backend=backend)
    for velocity, uncond, scale in (
        (p["velocity"], torch.zeros_like(p["velocity"]), 1.0),
        (torch.ones_like(p["velocity"]), p["velocity"], 0.0),
    ):
        q = p | {"velocity": velocity, "velocity_uncond": uncond, "guidance_scale": scale}
        guided = fk.sde_step(**q, backend=backend)
        assert torch.equal(guided[0], x_next) and torch.equal(guided[1], log_prob)


@law(30, r=chance, backend=backends)
def test_noise_follows_from_its_key_alone(r, backend):
    draw = Draw(r)
    shape, key = draw.shape(), draw.key(0)
    key["sample_id"] = torch.randint(-(2**62), 2**62, (shape[0],), generator=draw.g)
    key["step"] = torch.randint(0, 2**28, (shape[0],), generator=draw.g)
    whole = fk.philox_normal(shape, **key, backend=backend).flatten(1)
    if not whole.numel():
        return
    i, count = r.randrange(shape[0]), r.randint(1, whole.shape[1])
    one = {n: v[i : i + 1] if isinstance(v, torch.Tensor) else v for n, v in key.items()}
    assert torch.equal(fk.philox_normal((1, count), **one, backend=backend)[0], whole[i, :count])


# ---- the losses ----


@law(30, r=chance, backend=backends)
def test_on_policy_the_ratio_is_one(r, backend):
    """With the velocity itself as the old one, or none: the same loss and the same gradient."""
    p = calm(r).policy()
    for name in ("old_log_prob", "noise", "seed", "sample_id", "step", "velocity_uncond"):
        p.pop(name, None)
    x_next = p["x_next"]
    index = p["row"].long() if "row" in p else slice(None)
    p["x_next"] = p["x_t"][index].clone() if x_next is None else x_next
    p |= {"guidance_scale": 1.0, "ratio": "sde"}
    results = []
    for old in (None, p["velocity"].clone()):
        velocity = p["velocity"].detach().requires_grad_()
        q = verb(p) | {"velocity": velocity, "old_velocity": old, "backend": backend}
        out = fk.policy_loss(**q)
        assert (out.log_ratio == 0).all() and (out.ratio == 1).all()
        assert not (out.clipped_low | out.clipped_high).any()
        results.append((out.loss, *torch.autograd.grad(out.loss.sum(), velocity)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@needs_kernels
@pytest.mark.parametrize("name", ["policy", "matching"])
def test_a_sample_does_not_depend_on_its_batch(name):
    """Its loss and statistics have the same bits alone, with others, with other siblings."""

    @law(40, r=chance)
    def holds(r):
        p = getattr(calm(r), name)() | {"reduction": "none", "backend": "native"}
        run = getattr(fk, f"{name}_loss")
        batch = len(p["advantage"])
        if batch:
            order = torch.tensor(r.sample(range(batch), r.randint(1, batch)))
            whole, part = run(**verb(p)), run(**verb(picked(p, order)))
            for field, x, y in zip(whole._fields, whole, part, strict=True):
                assert same(x[order], y), field

    holds()


@pytest.mark.parametrize("name", ["policy", "matching"])
def test_siblings_are_copies_of_their_parent(name):
    """1 to 64 samples on a row: as if each had a row of its own; the gradients add up."""

    @law(40, r=chance, backend=backends)
    def holds(r, backend):
        draw = calm(r)
        draw.dtype = torch.float32
        p = getattr(draw, name)() | {"reduction": "none", "backend": backend}
        p.pop("velocity_uncond", None)
        p |= {"guidance_scale": 1.0} if name == "policy" else {}
        if "row" not in p:
            return
        row, run = p.pop("row").long(), getattr(fk, f"{name}_loss")
        names = ("velocity", "x_t", "old_velocity", "velocity_ref", "velocity_ema")
        copies = p | {n: p[n][row] for n in names if p.get(n) is not None}
        gradients, outputs = [], []
        for q in (p | {"row": row}, copies):
            velocity = q["velocity"].detach().requires_grad_()
            out = run(**verb(q) | {"velocity": velocity})
            gradients.append(
                torch.autograd.grad(out.loss, velocity, p[WEIGHTS].expand(len(row)))[0]
                if p[WEIGHTS].ndim
                else torch.autograd.grad(out.loss.sum(), velocity)[0]
            )
            outputs.append(out)
        for field, x, y in zip(out._fields, *outputs, strict=True):
            assert torch.equal(x, y) or backend == "reference", field
        expected = torch.zeros_like(gradients[0]).index_add(0, row, gradients[1])
        size = torch.zeros_like(gradients[0]).index_add(0, row, gradients[1].abs())
        assert ((gradients[0] - expected).abs() <= 1e-5 * size + 1e-30).all()

    holds()


@law(30, r=chance, backend=backends)
def test_x_next_drawn_again_is_the_one_that_was_stored(r, backend):
    draw = calm(r)
    shape = draw.shape()
    rows, _ = draw.edges(shape[0])
    x, old = (draw.latent(shape, dtype=torch.float32) for _ in range(2))
    velocity, noise = draw.latent(shape), draw.noise(shape)
    x_next, _ = fk.sde_step(x, old, rows, **noise, backend=backend)
    common = (rows, draw.per_sample(shape[0]), None, old)
    for ratio in ("sde", "guard"):
        stored = fk.policy_loss(velocity, x, x_next, *common, ratio=ratio, backend=backend)
        drawn = fk.policy_loss(velocity, x, None, *common, **noise, ratio=ratio, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(stored, drawn, strict=True))


@law(30, r=chance, backend=backends)
def test_clipped_samples_have_no_gradient(r, backend):
    draw = calm(r)
    p = draw.policy() | {"reduction": "none", "backend": backend, "kl_coef": 0.0}
    p.pop("row", None)
    batch = len(p["velocity"])
    if len(p["advantage"]) != batch:
        return
    velocity = p["velocity"].detach().requires_grad_()
    out = fk.policy_loss(**verb(p) | {"velocity": velocity})
    (gradient,) = torch.autograd.grad(out.loss.sum(), velocity)
    assert (gradient[out.clipped_low | out.clipped_high] == 0).all()


@law(30, r=chance, backend=backends)
def test_noised_samples_at_the_ends(r, backend):
    """sigma 0 is the sample, sigma 1 the noise; a velocity of noise - x0 matches exactly."""
    draw = calm(r)
    x0 = draw.latent(draw.shape(), dtype=torch.float32)
    batch, key = len(x0), draw.key(len(x0))
    noise = fk.philox_normal(x0.shape, **key, stream="match", backend=backend)
    for sigma, expected in ((0.0, x0), (1.0, noise)):
        x_t = fk.add_noise(x0, torch.full((batch,), sigma), **key, backend=backend)
        assert torch.equal(x_t, expected)
    sigma, advantage = draw.sigma(batch), draw.per_sample(batch)
    out = fk.matching_loss(noise - x0, x0, sigma, advantage, **key, backend=backend)
    assert (out.matching == 0).all()


@law(30, r=chance, backend=backends)
def test_rows_with_and_without_noise_in_one_batch(r, backend):
    """A row of std 0 beside others is what it is alone."""
    draw = calm(r)
    p = draw.step(history=False) | {"backend": backend}
    batch = len(p["x_t"])
    key = draw.key(batch)
    table = step_coefficients(sd3_sigmas(10), "cps", 0.7).table[torch.arange(batch) % 10].clone()
    table[::2, 2] = 0.0
    mixed = fk.sde_step(**p | {"c_rows": Coefficients(table)}, **key)
    for i in range(batch):
        one = {n: v[i : i + 1] if isinstance(v, torch.Tensor) else v for n, v in (p | key).items()}
        alone = fk.sde_step(**one | {"c_rows": Coefficients(table[i])})
        assert torch.equal(alone[0], mixed[0][i : i + 1])
        assert torch.equal(alone[1], mixed[1][i : i + 1])
