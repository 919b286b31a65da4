"""Grids and coefficients against published values, closed forms, diffusers, and each other."""

import math

import pytest
import torch

from flowkern import ode_step, sde_log_prob
from flowkern.schedules import (
    KINDS,
    Coefficients,
    edge_coefficients,
    flux_sigmas,
    multistep_coefficients,
    sd3_sigmas,
    shifted_sigmas,
    step_coefficients,
)

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# (sigma, sigma_next, a, b, std) to six digits, computed from the authors' released samplers.
PUBLISHED = [
    (sd3_sigmas(10), "flow_sde", 0.7, 0, (1.000000, 0.960129, 0.755000, -0.039871, 0.700000)),
    (sd3_sigmas(10), "flow_sde", 0.7, 1, (0.960129, 0.913349, 0.712541, -0.058242, 0.742964)),
    (sd3_sigmas(10), "flow_sde", 0.7, 4, (0.790368, 0.707278, 0.902892, -0.103447, 0.391794)),
    (sd3_sigmas(10), "flow_sde", 0.7, 7, (0.464876, 0.278049, 0.914463, -0.232600, 0.282007)),
    (sd3_sigmas(10), "flow_sde", 0.7, 8, (0.278049, 0.008929, 0.908672, -0.335055, 0.225360)),
    (sd3_sigmas(10), "flow_sde", 0.7, 9, (0.008929, 0.000000, 0.997793, -0.011116, 0.006278)),
    (sd3_sigmas(10), "cps", 0.8, 0, (1.000000, 0.960129, 0.336567, -0.039871, 0.913137)),
    (sd3_sigmas(10), "cps", 0.8, 4, (0.790368, 0.707278, 0.511283, -0.185540, 0.672662)),
    (sd3_sigmas(10), "cps", 0.8, 8, (0.278049, 0.008929, 0.993831, -0.273574, 0.008492)),
    (flux_sigmas(6, 1024), "flow_sde", 0.9, 0, (1.000000, 0.903736, 0.595000, -0.096264, 0.900000)),
    (flux_sigmas(6, 1024), "flow_sde", 0.9, 2, (0.789705, 0.652489, 0.735742, -0.192788, 0.646043)),
    (flux_sigmas(6, 1024), "flow_sde", 0.9, 4, (0.484218, 0.273003, 0.834150, -0.296757, 0.400768)),
    (shifted_sigmas(16, 3.0), "dance_sde", 0.3, 0, (1.0, 0.978261, 0.999022, -0.021739, 0.044233)),
    (shifted_sigmas(16, 3.0), "dance_sde", 0.3, 9, (0.7, 0.642857, 0.996327, -0.058245, 0.071714)),
    (shifted_sigmas(16, 3.0), "dance_sde", 0.3, 14, (0.3, 0.166667, 0.98, -0.147333, 0.109545)),
]


@pytest.mark.parametrize(("sigmas", "kind", "noise_level", "i", "expected"), PUBLISHED)
def test_published_values_to_all_printed_digits(sigmas, kind, noise_level, i, expected):
    c = step_coefficients(sigmas, kind, noise_level)[i]
    got = (sigmas[i], sigmas[i + 1], c.a, c.b, c.std)
    assert [f"{abs(float(g) - e):.6f}" for g, e in zip(got, expected, strict=True)] == [
        "0.000000"
    ] * 5


def test_sd3_grid_is_diffusers():
    diffusers = pytest.importorskip("diffusers")

    for steps in (1, 2, 10, 28, 40):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(scheduler.sigmas.double(), sd3_sigmas(steps), atol=1e-7, rtol=0)


def test_flux_grid_is_diffusers():
    import numpy as np

    diffusers = pytest.importorskip("diffusers")

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 6, 6), mu=0.63)
    torch.testing.assert_close(scheduler.sigmas.double(), flux_sigmas(6, 1024), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_constants_are_those_of_a_gaussian(kind):
    c = step_coefficients(sd3_sigmas(10), kind, 0.7)
    if (
        kind == "cps"
    ):  # its published log-probability leaves the variance out, on the deterministic last step too
        assert (c.k == 1).all() and (c.c == 0).all()
        return
    noisy = c.std > 0
    assert (c.k[~noisy] == 0).all() and (c.c[~noisy] == 0).all()
    std = c.std[noisy]
    torch.testing.assert_close(c.k[noisy], 1 / (2 * std**2))
    torch.testing.assert_close(c.c[noisy], -std.log() - 0.5 * math.log(2 * math.pi))
    assert noisy.any() == (kind != "ode")


def test_zero_noise_is_euler_exactly():
    for kind in ("flow_sde", "dance_sde"):
        zero, euler = (step_coefficients(sd3_sigmas(10), k, 0.0) for k in (kind, "ode"))
        assert torch.equal(zero.table, euler.table)


edges = st.tuples(st.floats(1e-3, 1.0), st.one_of(st.just(0.0), st.floats(1e-3, 0.999))).map(
    lambda p: (p[0], p[0] * p[1])
)


@hypothesis.given(edges, st.sampled_from(KINDS), st.floats(0.01, 1.0))
def test_every_sampler_keeps_the_marginals(edge, kind, noise_level):
    """For a point mass at 0 (x_t = sigma e, velocity = e) the variance after the step is
    sigma_next^2: exactly for ode, cps and dpm_sde; for the Euler-Maruyama SDEs up to the dt^2 term
    that follows from their formula."""
    s, n = edge
    c = edge_coefficients(s, n, kind, noise_level)
    s = float(c.sigma)  # 1 where it was near it
    variance = float((c.a * s + c.b) ** 2 + c.std**2)
    g2, dt = float(c.std) ** 2 / (s - n), n - s
    second_order = (
        dt**2 * (g2 / s + g2**2 / (4 * s**2)) if kind in ("flow_sde", "dance_sde") else 0.0
    )
    assert variance == pytest.approx(n**2 + second_order, rel=1e-9, abs=1e-12)


def test_edges_need_no_grid():
    grid = sd3_sigmas(10)
    for kind in KINDS:
        edges = step_coefficients(grid, kind, 0.6)
        for i in range(10):
            alone = edge_coefficients(float(grid[i]), float(grid[i + 1]), kind, 0.6)
            torch.testing.assert_close(alone.table, edges[i].table, atol=0, rtol=0)


# ---- multistep ----


def _dpm_solver_path(variant, order, sigmas, velocity, x, start=0, history=()):
    """x (1, 1) at every node after `start`, by the step, for a velocity of (x, sigma)."""
    history, xs = list(history), []
    for i in range(start, len(sigmas) - 1):
        m = multistep_coefficients(sigmas[max(0, i - 2) : i + 2], order, variant)
        v = velocity(x, sigmas[i])
        x, x0 = ode_step(x, v, m, history=history[: m.num_history], return_x0=True)
        history = [x0, *history][:2]
        xs.append(x)
    return torch.stack(xs)


@pytest.mark.parametrize(
    ("order", "variant"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")]
)
def test_multistep_agrees_with_diffusers(order, variant):
    diffusers = pytest.importorskip("diffusers")

    sigmas = sd3_sigmas(12).tolist()

    def velocity(x, s):
        return torch.sin(3 * x) + s

    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True,
        solver_order=order, solver_type=variant, lower_order_final=False, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(12)
    # From the second node: diffusers' first sigma may not be 1 (lambda is infinite there).
    start = 1
    scheduler.sigmas = torch.tensor(sigmas[start:], dtype=torch.float64)
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000
    scheduler.num_inference_steps = len(sigmas) - 1 - start
    start_x = torch.ones(1, 1, dtype=torch.float64)
    x, theirs = start_x, []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, sigmas[start + i]), t, x).prev_sample
        theirs.append(x)
    ours = _dpm_solver_path(variant, order, sigmas[start:], velocity, start_x)
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-6, rtol=1e-6)


def test_multistep_order_of_convergence():
    """x0 ~ N(1, 0.3^2): velocity and flow map are known; the first history comes from the exact
    path. Over a short way in log-SNR, on which the leading term shows with few steps.
    """

    def std(s):
        return math.sqrt((1 - s) ** 2 * 0.09 + s**2)

    def exact(s):
        return torch.tensor([[(1 - s) + 1.5 * std(s)]], dtype=torch.float64)

    def exact_x0(x, s):
        return 1 + (1 - s) * 0.09 / std(s) ** 2 * (x - (1 - s))

    def error(order, variant, steps):
        log_snr = torch.linspace(-0.5, 0.5, steps + 1, dtype=torch.float64)
        sigmas = torch.sigmoid(-log_snr).tolist()
        history = [exact_x0(exact(s), s) for s in (sigmas[1], sigmas[0])]
        path = _dpm_solver_path(
            variant,
            order,
            sigmas,
            lambda x, s: (x - exact_x0(x, s)) / s,
            exact(sigmas[2]),
            2,
            history,
        )
        return float((path[-1] - exact(sigmas[-1])).abs())

    # The published third-order update (diffusers' too) weighs the second difference by half of what
    # Taylor's series asks: a far smaller error than the second order's, but of the same order in
    # the end.
    expected = {(1, "midpoint"): 1, (2, "midpoint"): 2, (2, "heun"): 2, (3, "midpoint"): 2}
    coarse, fine = ({form: error(*form, steps) for form in expected} for steps in (50, 100))
    for form, rate in expected.items():
        assert math.log2(coarse[form] / fine[form]) == pytest.approx(rate, abs=0.05), form
    first, _, heun, third = fine.values()
    assert third < heun / 4 < first / 25


def test_multistep_falls_to_what_the_path_allows():
    euler = edge_coefficients(0.5, 0.4, "ode", 0.0)
    torch.testing.assert_close(multistep_coefficients((0.5, 0.4), 3).table, euler.table)
    last = multistep_coefficients((0.7, 0.6, 0.5, 0.0), 3)
    torch.testing.assert_close(last.table, edge_coefficients(0.5, 0.0, "ode", 0.0).table)
    assert last.num_history == 0
    assert multistep_coefficients((0.6, 0.5, 0.4), 3).num_history == 1
    from_noise = multistep_coefficients(
        (1.0, 0.9, 0.8), 2
    )  # lambda(1) is infinite: first order in effect
    torch.testing.assert_close(
        from_noise.a * 1 + from_noise.history.sum() * 0, edge_coefficients(0.9, 0.8, "ode", 0).a
    )


def test_stochastic_multistep_starts_from_dpm_sde():
    one = multistep_coefficients((0.5, 0.4), 2, sde=True)
    torch.testing.assert_close(one.table, edge_coefficients(0.5, 0.4, "dpm_sde", 0.0).table)
    two = multistep_coefficients((0.6, 0.5, 0.4), 2, sde=True)
    assert two.num_history == 1 and two.std > 0


# ---- edges and errors ----


def test_indexing():
    c = step_coefficients(sd3_sigmas(4), "flow_sde", 0.7)
    index = torch.tensor([3, 0, 0])
    assert len(c) == 4 and c[index].a.shape == (3,) and c[1].a.shape == ()
    assert torch.equal(c[index].std, c.std[index])
    assert c.to("cpu", torch.float32).a.dtype == torch.float32
    assert c.to("cpu", torch.float32) is c.to("cpu", torch.float32)
    with pytest.raises(IndexError, match="step 4 is out of range for 4 edges"):
        c[4]
    with pytest.raises(TypeError, match="expected integers"):
        c[torch.tensor([0.0])]


def test_edges_that_a_rollout_converts_serve_training():
    edge = edge_coefficients(0.8, 0.6, "flow_sde", 0.7)
    with torch.inference_mode():
        assert not edge.to(dtype=torch.float32).table.is_inference()
    v = torch.ones(1, 4, requires_grad=True)
    sde_log_prob(torch.zeros(1, 4), v, torch.ones(1, 4), edge).sum().backward()
    assert v.grad.isfinite().all()


def test_a_default_device_changes_nothing():
    """As torch.set_default_device("cuda") of a script: all is made on the CPU, from float64."""

    def made():
        own = step_coefficients(sd3_sigmas(4), lambda s, n, level: (1.0, n - s, level, 1, 0), 0.7)
        multistep = multistep_coefficients(flux_sigmas(3, 64).tolist()[:3], 2)
        return [own, multistep, edge_coefficients([0.9], [0.5], "cps", 0.7), shifted_sigmas(3, 3.0)]

    expected = made()
    with torch.device("meta"):
        found = made()
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(getattr(got, "table", got), getattr(wanted, "table", wanted))


@pytest.mark.parametrize("index", [(1, 2), (slice(None), 0), None, torch.tensor([[1]])], ids=repr)
def test_what_selects_no_edges_is_refused(index):
    with pytest.raises(
        IndexError, match=r"^index: expected an integer, a slice or a tensor \(B,\)"
    ):
        step_coefficients(sd3_sigmas(4), "ode", 0.0)[index]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sd3_sigmas(0), "num_steps"),
        (lambda: sd3_sigmas(10**12), "num_steps"),
        (lambda: shifted_sigmas(4, -1.0), "shift"),
        (lambda: flux_sigmas(4, 0), "image_seq_len"),
        (lambda: flux_sigmas(4, 10**9), "image_seq_len: expected .* at most"),
        (lambda: edge_coefficients(1.0, 0.5, "flow_sde", 10**400), "noise_level"),
        (lambda: edge_coefficients(1.00002, 0.5, "ode", 0.0), "sigma: expected values in"),
        (lambda: edge_coefficients(True, 0.5, "ode", 0.0), "sigma: expected numbers, got True"),
        (lambda: edge_coefficients(1.0, "0.5", "ode", 0.0), "sigma_next: expected numbers"),
        (lambda: step_coefficients([1.0, None], "ode", 0.0), "sigmas: expected numbers"),
        (lambda: step_coefficients(torch.ones(3).bool(), "ode", 0.0), "sigmas: expected numbers"),
        (lambda: step_coefficients([1j, 0], "ode", 0.0), "sigmas: expected numbers"),
        (lambda: multistep_coefficients(0.5, 2), "path_sigmas"),
        (lambda: multistep_coefficients(("a", "b"), 2), "path_sigmas: expected numbers"),
        (lambda: multistep_coefficients((math.nan, 0.5), 2), "expected values in"),
        (lambda: multistep_coefficients((0.6, 0.5), True), "order: expected 1, 2 or 3, got True"),
        (lambda: multistep_coefficients((0.6, 0.5), 2.0), "order: expected 1, 2 or 3, got 2.0"),
        (lambda: step_coefficients([1.0], "ode", 0.0), "sigmas: expected shape"),
        (
            lambda: step_coefficients([1.0, 0.5, 0.7], "ode", 0.0),
            "sigma_next: expected values below",
        ),
        (lambda: step_coefficients([1.0, math.nan, 0.0], "ode", 0.0), "expected values in"),
        (lambda: step_coefficients([1.5, 0.5], "ode", 0.0), r"sigma: expected values in \(0, 1\]"),
        (lambda: step_coefficients([1.0, 0.0], "sde", 0.7), "kind: got 'sde', expected one of cps"),
        (lambda: step_coefficients([1.0, 0.5], "flow_sde", -0.1), "noise_level"),
        (lambda: step_coefficients([1.0, 0.5], "flow_sde", math.inf), "noise_level"),
        (lambda: step_coefficients([1.0, 0.5], "cps", 2.5), "noise_level: cps"),
        (lambda: edge_coefficients(1.0, 0.5, "flow_sde", 0.7, sigma_max=1.0), "sigma_max"),
        (lambda: multistep_coefficients((0.5,), 2), "path_sigmas"),
        (lambda: multistep_coefficients((0.5, 0.6), 2), "path_sigmas: expected falling"),
        (lambda: multistep_coefficients((0.6, 0.5), 4), "order"),
        (lambda: multistep_coefficients((0.6, 0.5), 2, "euler"), "variant"),
        (lambda: multistep_coefficients((0.7, 0.6, 0.5), 3, sde=True), "sde"),
        (lambda: Coefficients(torch.zeros(3, 5)), "table"),
        (lambda: Coefficients(torch.full((9,), math.nan)), "table: expected finite numbers"),
        (lambda: Coefficients(-torch.ones(2, 9)), "table: expected std >= 0"),
        (lambda: edge_coefficients([0.5] * 99, [0.6] * 99, "ode", 0), r"sigma_next: .{,200}$"),
        (lambda: step_coefficients(sd3_sigmas(500), "flow_sde", 1e30), r"noise_level: .{,200}$"),
        (lambda: edge_coefficients([2.0] * 99, [0.5] * 99, "ode", 0), r"sigma: .{,200}$"),
        (lambda: Coefficients(torch.full((99, 9), -1.0)), r"table: .{,200}$"),
        (lambda: Coefficients(torch.zeros(9), 4), "num_history"),
        (lambda: Coefficients(torch.full((9,), 1e5)).to(dtype=torch.float16), "table: expected fi"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


NUMBERS = {  # a call of one number
    "num_steps": sd3_sigmas,
    "shift": lambda x: sd3_sigmas(4, x),
    "shift, plain": lambda x: shifted_sigmas(4, x),
    "num_steps, flux": lambda x: flux_sigmas(x, 1024),
    "image_seq_len": lambda x: flux_sigmas(4, x),
    "noise_level": lambda x: step_coefficients([1.0, 0.5], "flow_sde", x),
    "sigma_max": lambda x: edge_coefficients(1.0, 0.5, "flow_sde", 0.7, sigma_max=x),
    "sigma": lambda x: edge_coefficients(x, 0.0, "ode", 0.0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_in_one_sentence(name):
    numpy = pytest.importorskip("numpy")
    nothing = [True, numpy.True_, math.inf, -math.inf, math.nan, "1", {}, 1j, torch.eye(3)]
    nothing += [None] if name != "sigma_max" else []  # None: sigma_next
    for value in nothing:
        with pytest.raises(ValueError, match=rf"^{name.split(',')[0]}: expected [^\n]*$"):
            NUMBERS[name](value)
    one = 1 if name != "sigma_max" else 0
    expected = NUMBERS[name](one)
    floats = [numpy.float32(one), torch.tensor(float(one))] if "num" not in name else []
    for same in (numpy.int64(one), *floats):
        got = NUMBERS[name](same)
        assert torch.equal(getattr(got, "table", got), getattr(expected, "table", expected))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tables_are_of_real_floating_point_numbers(dtype):
    with pytest.raises(
        TypeError, match="table: expected a tensor of real floating-point numbers, got t"
    ):
        Coefficients(torch.ones(2, 9, dtype=dtype))
    with pytest.raises(TypeError, match="dtype: expected a real floating-point dtype, got"):
        Coefficients(torch.ones(2, 9)).to(dtype=dtype)
    with pytest.raises(TypeError, match="table: expected a tensor of .*, got list"):
        Coefficients([0.0] * 9)


@pytest.mark.parametrize("first", [0.999999, 1 - 1e-5, 1 + 9e-6, 1 - 2**-24])
def test_a_sigma_near_1_counts_as_1(first):
    """A grid that was rounded: flow_sde's 1 / (1 - sigma) is not of that rounding."""
    grid = sd3_sigmas(10).tolist()
    rounded = [first, *grid[1:]]
    for kind in KINDS:
        expected = step_coefficients(grid, kind, 0.7).table
        assert torch.equal(step_coefficients(rounded, kind, 0.7).table, expected)
        edges = [edge_coefficients(g[0], g[1], kind, 0.7, grid[1]).table for g in (grid, rounded)]
        assert torch.equal(*edges)
    for order in (1, 2, 3):
        paths = [(g[0], *grid[1:n]) for n in (2, 3, 4) for g in (grid, rounded)]
        tables = [multistep_coefficients(path, order).table for path in paths]
        assert all(map(torch.equal, tables[::2], tables[1::2]))
    twice = multistep_coefficients((1.0, 1 - 5e-6, 0.9), 2)
    assert torch.equal(twice.table, multistep_coefficients((1.0, 0.9), 2).table)
