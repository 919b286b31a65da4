"""What callers do by mistake or to the limit: no crash, and no wrong answer without a word."""

import os
import pickle
import re
import signal

import pytest
import torch
from calls import Problem, take
from needs import needs_native
from torch._subclasses.fake_tensor import FakeTensorMode

import flowkern as fk
from flowkern.schedules import Coefficients, multistep_coefficients, sd3_sigmas, step_coefficients

C = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)
X, V, NOISE = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0)).unbind()
KEY = {"seed": 1, "sample_id": torch.arange(2), "step": 0}


CALLS = take()
LEARNED = [call for call in CALLS if call.learned]


def bits(x):
    return x.view(torch.int32)


# ---- memory ----


@needs_native
def test_rows_in_any_layout():
    """A transposed table: the kernel must not read a copy that is gone."""
    table = torch.empty(9, 2).t().copy_(C.table[:2])
    expected = fk.sde_step(X, V, C[torch.tensor([0, 1])], **KEY)
    for _ in range(20):
        got = fk.sde_step(X, V, Coefficients(table), **KEY)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    rows = torch.empty(9, 2).t().copy_(C.table[:2])
    op = torch.ops.flowkern.sde_log_prob(X, V, expected[0], rows, None, 1.0, "native")
    assert torch.equal(op, expected[1])


MEMORY = torch.zeros(4, 64)  # `out` is its middle
HALVES = MEMORY.view(torch.bfloat16)
ACROSS = [  # arguments that lie across it, or are it where they may not be
    ("x_t", MEMORY[:2]),
    ("x_t", MEMORY[2:3].expand(2, 64)),
    ("x_t", MEMORY.view(-1)[65:193].view(2, 64)),
    ("x_t", MEMORY.view(-1)[64:].view(64, 3)[:, :2].t()),
    ("velocity", HALVES[1:2].view(2, 64)),
    ("velocity", MEMORY.view(2, 128)[:, :64]),
    ("noise", MEMORY[2:]),
    ("velocity_uncond", MEMORY[1:3]),
    ("history[0]", MEMORY[1:3]),
    ("sample_id", MEMORY[1].view(torch.int64)[:2]),
    ("sample_id", MEMORY[2].view(torch.int32)[-2:]),
    ("step", MEMORY[2].view(torch.int64)[-2:]),
    ("c_rows", Coefficients(MEMORY.view(-1)[50:68].view(2, 9))),
    ("c_rows", Coefficients(MEMORY.view(torch.float64).view(-1)[90:99])),
]


@pytest.mark.parametrize(("name", "value"), ACROSS)
def test_out_that_overlaps_an_input_is_refused(name, value, backend):
    """Whatever is read: every latent, ids, steps, coefficients."""
    arguments = {"x_t": X, "velocity": V, "c_rows": C[0], "backend": backend}
    change = {"history": [value]} if name == "history[0]" else {name: value}
    change |= {"guidance_scale": 2.0} if name == "velocity_uncond" else {}
    arguments |= change | ({} if name == "noise" else KEY | change)
    before = MEMORY.clone()
    for more in ({}, {"return_mean": True}, {"round_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=f"^out: overlaps {re.escape(name)}; expected memory"):
            fk.sde_step(**arguments, **more, out=MEMORY[1:3])
    keyed = {"noise", "seed", "sample_id", "step"}
    if name not in keyed:
        called = name.replace("c_rows", "m_rows")
        with pytest.raises(ValueError, match=f"^out: overlaps {re.escape(called)}; expected"):
            arguments["m_rows"] = arguments.pop("c_rows")
            step = {n: v for n, v in arguments.items() if n not in keyed}
            fk.ode_step(**step, out=MEMORY[1:3])
    assert torch.equal(MEMORY, before)


def test_out_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="out: expected a tensor that requires no gradient"):
        fk.ode_step(X, V, C[0], out=torch.empty(2, 64, requires_grad=True))
    trajectory = torch.randn(3, 2, 64)  # neighbors in one buffer are apart
    expected = fk.ode_step(trajectory[0].clone(), V, C[0])
    assert torch.equal(fk.ode_step(trajectory[0], V, C[0], out=trajectory[1]), expected)


def test_a_graph_notices_that_its_input_was_overwritten(backend):
    velocity, out = V.clone().requires_grad_(), torch.empty_like(X)
    fk.sde_step(X, V, C[0], **KEY, out=out, backend=backend)
    log_prob = fk.sde_log_prob(X, velocity, out, C[0], backend=backend)
    fk.sde_step(X, V, C[0], **KEY | {"seed": 2}, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()


def test_a_draw_in_place_has_a_gradient_as_elsewhere(backend):
    """It is made from the mean: that x_t has been overwritten does not show."""
    results = []
    for x in (X.clone(), X):
        v = V.clone().requires_grad_()
        out = None if x is X else x
        _, log_prob, mean = fk.sde_step(
            x, v, C[3], **KEY, out=out, return_mean=True, backend=backend
        )
        results.append([log_prob, *torch.autograd.grad(log_prob.sum() + mean.sum(), v)])
    assert all(map(torch.equal, *results))
    into = torch.empty_like(X)  # and that x_next has been does
    _, log_prob, _ = fk.sde_step(X, v, C[3], **KEY, out=into, return_mean=True, backend=backend)
    into.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()


@needs_native
def test_a_mean_is_written_apart_from_all_that_is_read():
    """Past the verbs, where memory is the caller's."""
    kernels, edge = fk.ops._common.native.cpu(), C.table[3].float()
    x, mean, log_prob = torch.empty(2, 64), torch.empty(2, 64), torch.empty(2)
    given = (X, V, edge, None, 1.0, [], NOISE, None, None, None)
    assert kernels.sde_draw_mean(*given, x, None, log_prob, None, mean, None, False) is not None
    for across in (x, X, NOISE, mean.double(), mean[:1], torch.empty(64, 2).t()):
        call = (*given, x, None, log_prob, None, across, None)
        assert kernels.sde_draw_mean(*call, False) is None
        with pytest.raises(ValueError, match="mean: not as the kernels read it"):
            kernels.sde_draw_mean(*call, True)


@needs_native
@pytest.mark.parametrize("way", ["dtype", "device"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_defaults_of_torch_do_not_shape_what_kernels_write(call, way):
    """A default dtype of other size, or a default device without memory: both once were written to
    as if they were float32 on the CPU.
    """
    p = Problem(call)
    apart = lambda x: torch.stack([x, x], -1)[..., 0] if x.ndim > 1 else x  # noqa: E731
    problems = (p, p.changed(apart))  # of which a copy is made
    expected = [p.run("native") for p in problems]
    try:
        if way == "dtype":
            torch.set_default_dtype(torch.float16)
        else:
            torch.set_default_device("meta")
        got = [p.run("native") for p in problems]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for x, y in zip(sum(got, ()), sum(expected, ()), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


# ---- tracing, copies ----


def test_fake_tensors_and_compilation():
    with FakeTensorMode():
        assert fk.philox_normal((2, 8), 0, torch.arange(2), 0).shape == (2, 8)
        x = torch.empty(2, 8)
        x_next, log_prob = fk.sde_step(x, x, Coefficients(torch.zeros(9)), noise=x)
        assert x_next.shape == (2, 8) and log_prob.shape == (2,)
    draw = lambda ids, step: fk.philox_normal((2, 8), 5, ids, step, "match")  # noqa: E731
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for step in (3, torch.tensor([1, 2])):
        assert torch.equal(compiled(torch.arange(2), step), draw(torch.arange(2), step))
    torch.library.opcheck(
        torch.ops.flowkern.philox_normal, ([2, 8], 5, torch.arange(2), None, 3, 1, None)
    )


def test_coefficients_can_be_pickled_and_edited():
    c = C[torch.tensor([3, 4])]
    first = fk.sde_step(X, V, c, noise=NOISE)[0]
    again = pickle.loads(pickle.dumps(c))
    assert torch.equal(fk.sde_step(X, V, again, noise=NOISE)[0], first)
    c.table[:, 2] = 0  # after a use: the float32 copy must follow
    assert torch.equal(fk.sde_step(X, V, c, noise=NOISE)[0], fk.ode_step(X, V, c))
    with torch.inference_mode():
        fk.sde_step(X, V, step_coefficients(sd3_sigmas(4), "cps", 1.2)[0], noise=NOISE)


# ---- values ----


def test_any_number_of_threads_gives_the_same_log_prob(backend):
    """Large enough that torch would split its sums among threads."""
    x, v, n = (torch.randn(3, 150_003) for _ in range(3))
    rows, threads = C[torch.tensor([0, 4, 8])], torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fk.sde_log_prob(x, v, n, rows, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    truth = fk.sde_log_prob(x.double(), v.double(), n.double(), rows)
    assert ((results[0] - truth) / truth).abs().max() < 5e-7


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_after_threads_computes_the_same():
    """The threads are not in the child; it ends by an alarm where it waits for them."""
    c = step_coefficients(sd3_sigmas(10), "flow_sde", noise_level=0.7)[4]
    x, v = torch.randn(2, 8, 65_536)
    draw = lambda: fk.sde_step(x, v, c, seed=1, sample_id=torch.arange(8), step=0)[1]  # noqa: E731
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = draw()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if draw().tolist() == expected.tolist() else 1)
    finally:
        torch.set_num_threads(threads)
    assert os.waitpid(child, 0)[1] == 0


def test_infinities_and_signed_zeros_agree_to_the_bit():
    m = multistep_coefficients((0.9, 0.8, 0.7), 2)
    x = X.clone()
    x[0, 0], x[1, 1] = float("inf"), -0.0
    velocity = V.clone()
    velocity[1, 1] = 0.0
    for rows, history in (
        (m, [NOISE]),
        (C[9], []),
        (step_coefficients(sd3_sigmas(4), "ode", 0)[1], []),
    ):
        native, plain = (
            fk.ode_step(x, velocity, rows, history=history, backend=b)
            for b in ("native", "reference")
        )
        assert torch.equal(bits(native), bits(plain))


@needs_native
def test_every_half_and_its_roundings():
    """All 16-bit values in, float32 values of every magnitude out, as torch converts them."""
    identity = Coefficients(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0]))
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = everything.view(dtype)
        values = values[torch.isfinite(values)].reshape(2, -1)
        out = fk.ode_step(
            values, torch.zeros_like(values), identity, out_dtype=torch.float32, backend="native"
        )
        assert torch.equal(out, values.float())
        g = torch.Generator().manual_seed(0)
        floats = (
            torch.randint(-(2**31), 2**31 - 1, (2, 500_003), generator=g).int().view(torch.float32)
        )
        floats[0, :7] = torch.tensor(
            [65519.9, 65520.0, 6e-8, 2.98e-8, 2.99e-8, -6.1e-5, float("inf")]
        )
        zeros = torch.zeros_like(floats)
        rounded = fk.ode_step(floats, zeros, identity, out_dtype=dtype, backend="native")
        expected = floats.to(dtype)
        assert torch.equal(rounded.isnan(), expected.isnan())
        assert torch.equal(rounded[~rounded.isnan()], expected[~expected.isnan()])


def test_ids_and_steps_are_checked_by_value():
    with pytest.raises(TypeError, match="sample_id: expected int64, got torch.float32"):
        fk.philox_normal((2, 4), 0, [0.2, 0.9], 0)
    for step in (-1, 2**28):
        with pytest.raises(IndexError, match="step: expected values in"):
            fk.philox_normal((2, 4), 0, [0, 1], torch.tensor([0, step]))
    with pytest.raises(TypeError, match="index: expected integers"):
        C[torch.tensor([1, 0], dtype=torch.uint8)]
    with pytest.raises(ValueError, match="guidance_scale: expected a finite number"):
        fk.sde_step(X, V, C[0], **KEY, velocity_uncond=V, guidance_scale=float("nan"))
    with pytest.raises(ValueError, match="guidance_scale: expected a finite number"):
        fk.sde_step(X, V, C[0], **KEY, velocity_uncond=V, guidance_scale=torch.ones(64))
    with pytest.raises(ValueError, match="c_rows: a replay takes one-step edges"):
        fk.sde_log_prob(X, V, NOISE, multistep_coefficients((0.9, 0.8, 0.7), 2))


# ---- the policy loss ----


def test_only_the_velocity_of_a_policy_loss_has_a_gradient():
    leaves = {
        n: t.clone().requires_grad_() for n, t in {"velocity": V, "x_t": X, "x_next": NOISE}.items()
    }
    advantage = torch.tensor([1.0, -1.0], requires_grad=True)
    expected = None
    for old in (V, leaves["velocity"]):  # not detached: the training must not stand still
        leaves["velocity"].grad = None
        fk.policy_loss(**leaves, c_rows=C[3], advantage=advantage, old_velocity=old).loss.backward()
        gradient = leaves["velocity"].grad.clone()
        expected = gradient if expected is None else expected
        assert torch.equal(gradient, expected) and (gradient != 0).any()
    assert leaves["x_t"].grad is None and leaves["x_next"].grad is None and advantage.grad is None


WITHOUT_SLOPE = {
    "advantage": {"advantage": torch.zeros(2)},
    "weight": {"step_weight": torch.zeros(2)},
    "guarded": {"advantage": -torch.zeros(2), "ratio": "guard"},
    "no noise": {"c_rows": C[9].to(dtype=torch.float32), "ratio": "guard"},  # std made 0 below
    "siblings": {"advantage": torch.tensor([0.0, 0.0]), "row": torch.tensor([1, 1])},
}


@pytest.mark.parametrize("where", ["velocity", "x_next", "x_t"])
@pytest.mark.parametrize("case", WITHOUT_SLOPE)
def test_nan_passes_where_nothing_is_learned_on_policy(case, where, backend):
    """The ratio is 1 without a look at the data: 0 times NaN must not come out as 0."""
    tensors = {"velocity": V.clone(), "x_t": X.clone(), "x_next": NOISE.clone()}
    tensors[where][1, 5] = torch.nan
    p = {"c_rows": C[3], "advantage": torch.ones(2)} | WITHOUT_SLOPE[case]
    if case == "no noise":
        table = p["c_rows"].table.clone()
        table[2:5] = 0
        p["c_rows"] = Coefficients(table)
    velocity = tensors["velocity"].requires_grad_()
    loss = fk.policy_loss(**tensors, **p, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert gradient[1, 5].isnan()
    assert (gradient[0] == 0).all()
    if backend != "reference":  # whose ratio is NaN, and with it the whole sample
        assert gradient.isnan().sum() == 1 and (gradient.nan_to_num() == 0).all()


def test_policy_loss_of_edges_without_noise_and_of_nothing():
    last = step_coefficients(sd3_sigmas(10), "cps", 0.8)[9]
    a = torch.ones(2)
    out = fk.policy_loss(
        V.clone().requires_grad_(), X, NOISE, last, a, old_velocity=V, velocity_ref=X
    )
    assert torch.isfinite(out.loss) and (out.kl == 0).all()
    empty = fk.policy_loss(
        V[:0].requires_grad_(), X[:0], NOISE[:0], C[3], a[:0], old_velocity=V[:0]
    )
    assert empty.loss == 0 and empty.loss.requires_grad
    flat = torch.empty(2, 0)
    assert fk.policy_loss(flat, flat, flat, C[3], a, old_velocity=flat).loss == -1
    with pytest.raises(ValueError, match="kl_coef: expected a finite number"):
        fk.policy_loss(V, X, NOISE, C[3], a, velocity_ref=X, kl_coef=float("nan"))
    with pytest.raises(TypeError, match="row: expected an integer tensor"):
        fk.policy_loss(V, X, NOISE, C[3], a, row=1)


# ---- found by random calls ----


def test_values_of_a_wrong_kind_are_named():
    complex_ids = torch.ones(2, dtype=torch.complex64)
    matching = {"noise": NOISE, "backend": "reference"}
    for name, error, call in (
        ("sample_id", TypeError, lambda: fk.philox_normal((2, 4), 0, complex_ids, 0)),
        ("shape", ValueError, lambda: fk.philox_normal("ab", 0, [0, 1], 0)),
        ("x_t", TypeError, lambda: fk.sde_step("text", V, C[0], **KEY)),
        ("history", TypeError, lambda: fk.sde_step(X, V, C[0], **KEY, history=3)),
        ("row", TypeError, lambda: fk.policy_loss(V, X, X, C[0], X[:, 0], row=complex_ids)),
        ("clip_low", ValueError, lambda: fk.policy_loss(V, X, X, C[0], X[:, 0], clip_low=None)),
        ("clip_high", ValueError, lambda: fk.policy_loss(V, X, X, C[0], X[:, 0], clip_high="x")),
        ("row", TypeError, lambda: fk.matching_loss(V, X, 0.5, X[:, 0], complex_ids, **matching)),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            call()


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
@pytest.mark.parametrize("power", [0.25, 0.6])
def test_on_policy_ratio_is_one_though_the_matching_error_overflows(backend, weighting, power):
    """Squares of 1e25 are past float32: the ratio of a policy to itself is 1 all the same."""
    how = {"weighting": weighting, "ghuber_power": power if weighting == "ghuber" else 0.25}
    out = fk.matching_loss(1e25 * V, X, 0.5, torch.ones(2), noise=NOISE, backend=backend, **how)
    assert out.matching.isinf().all()
    assert (out.log_ratio == 0).all() and (out.ratio == 1).all() and out.loss == -1


@needs_native
@pytest.mark.parametrize("call", [c for c in CALLS if c.has("row")], ids=str)
def test_rows_of_any_stride_name_the_same_samples(call):
    p = Problem(call)
    strided = torch.stack([p["row"], torch.full_like(p["row"], 7)], -1)[:, 0]
    assert all(map(torch.equal, p.run("native", row=strided), p.run("native")))


@needs_native
@pytest.mark.parametrize("call", LEARNED, ids=str)
def test_a_gradient_to_be_differentiated_again_is_refused(call):
    """It would pass for a constant, and a penalty on it would vanish without a word."""
    p = Problem(call)
    gradient_of = lambda **k: torch.autograd.grad(  # noqa: E731
        p.run("native", learn=False)[0], p["velocity"], p.weight, **k
    )[0]
    with pytest.raises(RuntimeError, match="second derivative.*backend='reference'"):
        gradient_of(create_graph=True)
    assert gradient_of().isfinite().all()


def test_numbers_of_other_libraries_are_numbers():
    numpy = pytest.importorskip("numpy")
    half, step = numpy.float32(0.5), numpy.int64(3)
    plain = fk.matching_loss(V, X, 0.5, torch.ones(2), noise=NOISE, clip_high=0.5).loss
    for sigma in (half, torch.tensor(0.5)):
        got = fk.matching_loss(V, X, sigma, torch.ones(2), noise=NOISE, clip_high=half).loss
        assert torch.equal(got, plain)
    got = fk.sde_step(X, V, C[0], seed=1, sample_id=torch.arange(2), step=step)[0]
    assert torch.equal(got, fk.sde_step(X, V, C[0], seed=1, sample_id=torch.arange(2), step=3)[0])
    for name, call in (("step", lambda: fk.philox_normal((2, 4), 0, [0, 1], 2.5)),
                       ("sigma", lambda: fk.add_noise(X, True, noise=NOISE))):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            call()


@needs_native
def test_a_tensor_without_memory_anywhere_is_traced():
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.zeros(2)
        out = fk.policy_loss(V, X, X, C[0].to(dtype=torch.float32), fake, old_velocity=V)
        assert out.loss.shape == ()
