"""The step against the float64 truth, and the laws of the numerical contract (docs/numerics.md)."""

import pytest
import torch

import flowkern as fk
from flowkern.ops._common import native
from flowkern.ops._common.dispatch import choose
from flowkern.schedules import KINDS, multistep_coefficients, sd3_sigmas, step_coefficients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Images, packed tokens, video; one element; neither a multiple of the chunk, nor of four, nor of a
# vector.
SHAPES = ((3, 4, 16, 16), (2, 65, 64), (2, 40_001), (2, 3, 5, 7, 11), (4, 1), (2, 16_385))


def problem(
    shape=(3, 4, 16, 16), kind="flow_sde", dtype=torch.float32, seed=0, uncond=False, history=0
):
    """Arguments of a step as keywords, with one row per sample."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    steps = torch.randint(0, 9, (shape[0],), generator=g)
    arguments = {
        "x_t": draw(),
        "velocity": draw(),
        "c_rows": step_coefficients(sd3_sigmas(10), kind, 0.7)[steps],
    }
    if uncond:
        arguments |= {"velocity_uncond": draw(), "guidance_scale": 4.5}
    if history:
        arguments["history"] = [draw() for _ in range(history)]
    return arguments


def double(arguments):
    wide = lambda v: v.double() if isinstance(v, torch.Tensor) else v  # noqa: E731
    return {k: [wide(x) for x in v] if k == "history" else wide(v) for k, v in arguments.items()}


def key(batch, seed=3):
    return {"seed": seed, "sample_id": torch.arange(batch) * 977 + 5, "step": 4}


def noise_of(arguments, seed=3):
    k = key(len(arguments["x_t"]), seed)
    return fk.philox_normal(
        arguments["x_t"].shape, k["seed"], k["sample_id"], k["step"], backend="reference"
    )


@pytest.fixture
def instruction_sets():
    """Goes through those that this build and processor serve; the widest is in use afterwards."""
    kernels = native.cpu()
    names = ["baseline", "avx2", "avx512"]

    def each():
        if kernels is None:
            yield "none"
            return
        widest = kernels.isa()
        try:
            for isa in names[: names.index(widest) + 1]:
                kernels.use_isa(isa)
                yield isa
        finally:
            kernels.use_isa(widest)

    return each


# ---- against the truth ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_float64(kind, dtype, backend, poisoned_empty):
    """At most twice the error of the float32 reference, for every shape, with and without guidance
    and history.
    """
    for shape, uncond, history in zip(SHAPES, (False, True) * 3, (0, 2, 0, 1, 0, 3), strict=True):
        arguments = problem(shape, kind, dtype, uncond=uncond, history=history)
        out_dtype = torch.float32
        x_next, log_prob = fk.sde_step(
            **arguments, **key(shape[0]), out_dtype=out_dtype, backend=backend
        )
        plain, plain_log_prob = fk.sde_step(
            **arguments, noise=noise_of(arguments), out_dtype=out_dtype, backend="reference"
        )
        true, _ = fk.sde_step(**double(arguments), noise=noise_of(arguments).double())
        assert torch.equal(
            x_next, plain
        )  # with equal noise bits, every float32 backend rounds alike
        assert (x_next - true).abs().max() <= 2e-6 * true.abs().max()
        if history:
            continue
        replayed = fk.sde_log_prob(
            **{k: v for k, v in double(arguments).items() if k != "history"}, x_next=x_next.double()
        )
        assert (log_prob - replayed).abs().max() <= max(
            2 * float((plain_log_prob - replayed).abs().max()), 5e-7
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_close_to_float64_autograd(dtype, backend, poisoned_empty):
    for shape, uncond in zip(SHAPES, (False, True) * 3, strict=True):
        arguments = problem(shape, dtype=dtype, uncond=uncond)
        x_next, _ = fk.sde_step(**arguments, **key(shape[0]), out_dtype=torch.float32)
        weight = torch.linspace(-1, 2, shape[0])

        def gradient(arguments, x_next, backend, weight=weight):
            velocity = arguments["velocity"].clone().requires_grad_()
            log_prob = fk.sde_log_prob(
                **arguments | {"velocity": velocity}, x_next=x_next, backend=backend
            )
            (log_prob * weight).sum().backward()
            return velocity.grad

        got = gradient(arguments, x_next, backend)
        velocity = arguments["velocity"].double().requires_grad_()
        guided = velocity
        if uncond:
            u = arguments["velocity_uncond"].double()
            guided = u + 4.5 * (velocity - u)
        a, b, k = (
            getattr(arguments["c_rows"], n).reshape(-1, *[1] * (len(shape) - 1)) for n in "abk"
        )
        mean = a * arguments["x_t"].double() + b * guided
        log_prob = (-k * (x_next.double() - mean) ** 2).flatten(1).mean(1)
        (log_prob * weight).sum().backward()
        true = velocity.grad
        assert got.dtype == dtype
        resolution = torch.finfo(dtype).eps
        # At most the reference's error twice over, and for bfloat16 and float16 their own rounding;
        # no bias beyond that.
        allowed = 2 * (gradient(arguments, x_next, "reference").double() - true).abs().max()
        assert (got.double() - true).abs().max() <= max(allowed, resolution * true.abs().max())
        assert allowed <= max(20 * resolution, 2e-5) * true.abs().max()
        cosine = torch.nn.functional.cosine_similarity(
            got.double().flatten(), true.flatten(), dim=0
        )
        bias = (got.double() - true).mean().abs() / true.abs().mean()
        slack = max(resolution, 1e-6)
        assert cosine > 1 - slack and bias < slack


def test_reference_passes_gradcheck():
    arguments = double(problem((2, 3, 2), uncond=True))
    velocity = arguments.pop("velocity").requires_grad_()
    x_next = torch.randn(2, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: fk.sde_log_prob(velocity=v, x_next=x_next, **arguments, backend="reference"),
        velocity,
    )


def test_log_prob_is_a_density():
    """D = 1: the exponential of the log-probability integrates to 1 over x_next."""
    c = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[3].to(dtype=torch.float64)
    x_next = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    x_t, velocity = torch.full_like(x_next, 0.3), torch.full_like(x_next, -0.8)
    density = fk.sde_log_prob(x_t, velocity, x_next, c).exp()
    assert float(torch.trapezoid(density, x_next[:, 0])) == pytest.approx(1, abs=1e-9)


# ---- the laws ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_replayed_ratio_is_exactly_one_for_any_split(dtype, backend):
    """Same velocity, same backend: the replay is the draw bit for bit, in whatever batch and on
    however many threads.
    """
    arguments = problem((6, 3, 37, 41), dtype=dtype, uncond=True)
    x_next, drawn = fk.sde_step(**arguments, **key(6), backend=backend)
    tensors = ("x_t", "velocity", "velocity_uncond")
    threads = torch.get_num_threads()
    try:
        for split in ([6], [1] * 6, [2, 4], [5, 1]):
            torch.set_num_threads(1 if split[0] == 1 else 3)
            parts = []
            for index in torch.randperm(6).split(split):
                part = (
                    arguments
                    | {n: arguments[n][index] for n in tensors}
                    | {"c_rows": arguments["c_rows"][index]}
                )
                parts.append(
                    (index, fk.sde_log_prob(**part, x_next=x_next[index], backend=backend))
                )
            replayed = torch.empty(6)
            for index, log_prob in parts:
                replayed[index] = log_prob
            assert torch.equal(replayed, drawn)
    finally:
        torch.set_num_threads(threads)
    velocity = arguments.pop("velocity").requires_grad_()
    assert torch.equal(
        fk.sde_log_prob(velocity=velocity, x_next=x_next, **arguments, backend=backend), drawn
    )


def test_log_prob_is_that_of_the_stored_sample(backend):
    """With a bfloat16 x_next the log-probability is of the rounded value: a replay from storage
    gives ratio 1.
    """
    arguments = problem((4, 4, 16, 16))
    x_next, drawn = fk.sde_step(**arguments, **key(4), out_dtype=torch.bfloat16, backend=backend)
    exact, unrounded = fk.sde_step(**arguments, **key(4), backend=backend)
    assert x_next.dtype == torch.bfloat16 and torch.equal(x_next, exact.bfloat16())
    assert torch.equal(fk.sde_log_prob(**arguments, x_next=x_next, backend=backend), drawn)
    assert not torch.equal(drawn, unrounded)


def test_std_zero_is_euler_exactly(backend):
    """Bit for bit x_t + dt velocity, whatever the noise, NaN included; log_prob is 0."""
    arguments = problem((3, 5, 7)) | {
        "c_rows": step_coefficients(sd3_sigmas(10), "ode", 0.0)[torch.tensor([0, 4, 9])]
    }
    dt = sd3_sigmas(10).diff()[[0, 4, 9]].float().reshape(3, 1, 1)
    euler = arguments["x_t"] + dt * arguments["velocity"]
    nan = torch.full((3, 5, 7), float("nan"))
    for noise in ({"noise": nan}, key(3)):
        x_next, log_prob = fk.sde_step(**arguments, **noise, backend=backend)
        assert torch.equal(x_next, euler) and torch.equal(log_prob, torch.zeros(3))
    assert torch.equal(
        fk.ode_step(arguments["x_t"], arguments["velocity"], arguments["c_rows"], backend=backend),
        euler,
    )
    # Rows with and without noise in one batch.
    mixed = torch.stack(
        [arguments["c_rows"].table[0], step_coefficients(sd3_sigmas(10), "flow_sde", 0.7).table[4]]
    )
    nan[1] = 0.5
    x_next, _ = fk.sde_step(
        arguments["x_t"][:2],
        arguments["velocity"][:2],
        fk.schedules.Coefficients(mixed),
        noise=nan[:2],
        backend=backend,
    )
    assert torch.equal(x_next[0], euler[0]) and torch.isfinite(x_next).all()


def test_noise_does_not_depend_on_the_batch(backend):
    arguments = problem((4, 3, 30))
    whole, _ = fk.sde_step(**arguments, **key(4), backend=backend)
    for i in range(4):
        one = {n: arguments[n][i : i + 1] for n in ("x_t", "velocity")} | {
            "c_rows": arguments["c_rows"][i : i + 1]
        }
        k = key(4)
        alone, _ = fk.sde_step(
            **one, **k | {"sample_id": k["sample_id"][i : i + 1]}, backend=backend
        )
        assert torch.equal(alone, whole[i : i + 1])


# ---- the mean, and x_next through a storage dtype ----


def written_out(arguments, velocity, x_next=None, noise=None):
    """(log_prob, mean) by the formula, as functions of the velocity, in its dtype; and x_next."""
    columns = arguments["c_rows"].table.to(velocity.dtype)
    columns = columns.reshape(-1, 9, *[1] * (velocity.ndim - 1)).unbind(1)
    a, b, std, k, c, *weights = columns
    v = velocity
    if "velocity_uncond" in arguments:
        u = arguments["velocity_uncond"].to(v.dtype)
        v = u + arguments["guidance_scale"] * (v - u)
    mean = a * arguments["x_t"].to(v.dtype) + b * v
    for weight, earlier in zip(weights, arguments.get("history", ()), strict=False):
        mean = mean + weight * earlier.to(v.dtype)
    if x_next is None:
        x_next = (mean + std * noise).detach()
    return (c - k * (x_next.to(v.dtype) - mean) ** 2).flatten(1).mean(1), mean, x_next


@pytest.mark.parametrize("verb", ["draw", "replay"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_both_gradients_against_autograd(dtype, verb, backend, poisoned_empty):
    """Of log_prob, of the mean, of both: with and without guidance and history."""
    for shape, uncond, history in zip(SHAPES, (False, True) * 3, (0, 2, 0, 1, 0, 3), strict=True):
        history *= verb == "draw"
        arguments = problem(shape, dtype=dtype, uncond=uncond, history=history)
        if history:
            arguments["c_rows"] = multistep_coefficients((0.9, 0.8, 0.7), 2, sde=True)
        velocity = arguments.pop("velocity").requires_grad_()
        noise = noise_of(arguments)
        if verb == "draw":
            given = {**arguments, "noise": noise, "out_dtype": torch.float32, "backend": backend}
            x_next, log_prob, mean = fk.sde_step(velocity=velocity, **given, return_mean=True)
            plain = fk.sde_step(velocity=velocity, **given)
            assert torch.equal(x_next, plain[0]) and torch.equal(log_prob, plain[1])
            assert not x_next.requires_grad
        else:
            x_next = written_out(arguments, velocity.detach().float(), noise=noise)[2]
            given = {**arguments, "x_next": x_next, "backend": backend}
            log_prob, mean = fk.sde_log_prob(velocity=velocity, **given, return_mean=True)
            assert torch.equal(log_prob, fk.sde_log_prob(velocity=velocity, **given))
        true = velocity.detach().double().requires_grad_()
        expected = written_out(arguments, true, x_next)
        assert mean.dtype == torch.float32 and (mean - expected[1]).abs().max() < 4e-6
        weights = torch.linspace(-1, 2, shape[0]), noise / noise[0].numel()
        for used in ((0,), (1,), (0, 1)):  # either may be missing
            (got,), (wanted,) = (
                torch.autograd.grad(
                    [r[j] for j in used], x, [weights[j].to(r[j].dtype) for j in used],
                    retain_graph=True,
                )
                for r, x in (((log_prob, mean), velocity), (expected, true))
            )  # fmt: skip
            near = max(torch.finfo(dtype).eps, 1e-5) * float(wanted.abs().max())
            torch.testing.assert_close(got.double(), wanted, rtol=torch.finfo(dtype).eps, atol=near)
            assert got.dtype == dtype


def test_a_mean_alone_does_not_read_what_was_drawn(backend):
    """Its gradient is b times what comes in, though x_next is not a number."""
    arguments = problem((2, 3, 5))
    velocity = arguments.pop("velocity").requires_grad_()
    x_next = torch.full((2, 3, 5), torch.nan)
    log_prob, mean = fk.sde_log_prob(
        velocity=velocity, x_next=x_next, **arguments, return_mean=True, backend=backend
    )
    assert log_prob.isnan().all()
    (gradient,) = torch.autograd.grad(mean.sum(), velocity)
    b = arguments["c_rows"].b.float().reshape(2, 1, 1)
    assert torch.equal(gradient, b.expand_as(gradient))


def test_a_mean_that_was_written_over_is_noticed(backend):
    arguments = problem((2, 3, 5))
    arguments["velocity"].requires_grad_()
    _, log_prob, mean = fk.sde_step(**arguments, **key(2), return_mean=True, backend=backend)
    with torch.no_grad():
        mean.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()
    with torch.no_grad():
        _, log_prob, mean = fk.sde_step(**arguments, **key(2), return_mean=True, backend=backend)
    assert not log_prob.requires_grad and not mean.requires_grad


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_mean_under_torch_func(transform):
    """log_prob and mean as functions of the velocity; x_next is held fixed."""
    arguments = {n: v for n, v in double(problem((2, 3, 5), uncond=True)).items()}
    velocity, noise = arguments.pop("velocity"), torch.randn(2, 3, 5, dtype=torch.float64)
    x_next = written_out(arguments, velocity, noise=noise)[2]
    x_t, tangent = arguments.pop("x_t"), torch.randn_like(velocity)

    def replay(v):
        return fk.sde_log_prob(x_t, v, x_next, **arguments, return_mean=True)

    def draw(v):
        return fk.sde_step(x_t, v, **arguments, noise=noise, return_mean=True)[1:]

    def plain(v):
        return written_out(arguments | {"x_t": x_t}, v, x_next)[:2]

    total = lambda f: lambda v: sum(x.sum() for x in f(v))  # noqa: E731
    for ours in (replay, draw):
        if transform == "grad":
            results = (torch.func.grad(total(f))(velocity) for f in (ours, plain))
        elif transform == "jvp":
            results = (torch.func.jvp(f, (velocity,), (tangent,)) for f in (ours, plain))
        else:
            if ours is draw:
                continue  # a draw writes into memory that vmap has not wrapped
            both = torch.stack([velocity, tangent])
            results = (torch.func.vmap(f)(both) for f in (ours, plain))
        torch.testing.assert_close(*results)


def test_second_derivative_through_a_mean_of_the_reference():
    arguments = double(problem((2, 3, 4), uncond=True))
    velocity = arguments.pop("velocity").requires_grad_()
    x_next = torch.randn(2, 3, 4, dtype=torch.float64)

    def both(v):
        log_prob, mean = fk.sde_log_prob(velocity=v, x_next=x_next, **arguments, return_mean=True)
        return log_prob, mean

    assert torch.autograd.gradcheck(both, velocity)
    assert torch.autograd.gradgradcheck(both, velocity)


def test_both_halves_of_guidance_learn_from_a_mean(backend):
    arguments = problem((2, 3, 40), uncond=True)
    x_next = torch.randn(2, 3, 40)
    halves = [arguments[n].requires_grad_() for n in ("velocity", "velocity_uncond")]
    log_prob, mean = fk.sde_log_prob(
        **arguments, x_next=x_next, uncond_gradient=True, return_mean=True, backend=backend
    )
    of = lambda log_prob, mean: log_prob.sum() + mean.square().mean()  # noqa: E731
    got = torch.autograd.grad(of(log_prob, mean), halves)
    v, u = (x.detach().double().requires_grad_() for x in halves)
    guided = u + 4.5 * (v - u)
    rest = {n: arguments[n] for n in ("x_t", "c_rows")}
    wanted = torch.autograd.grad(of(*written_out(rest, guided, x_next)[:2]), (v, u))
    for have, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            have.double(), true, rtol=1e-5, atol=1e-6 * float(true.abs().max())
        )


def test_means_compile_whole(backend):
    """Draw and replay, both differentiable, with the bits of the eager way; in place, too."""
    arguments = problem((3, 4, 33))
    rows = arguments["c_rows"].to(dtype=torch.float32)

    def train(x, v, ids, into):
        drawn = {"seed": 5, "sample_id": ids, "step": 2, "return_mean": True, "backend": backend}
        x_next, log_prob, mean = fk.sde_step(x, v * 1.0, rows, **drawn, out=into)
        with torch.no_grad():
            still = fk.sde_step(x, v, rows, **drawn, round_dtype=torch.bfloat16)
        replayed = fk.sde_log_prob(x, v * 1.0, x_next, rows, return_mean=True, backend=backend)
        return x_next, log_prob, mean, *still, *replayed

    results = []
    for run in (train, torch.compile(train, fullgraph=True, backend="aot_eager")):
        v = arguments["velocity"].clone().requires_grad_()
        into = torch.empty_like(v)
        out = run(arguments["x_t"], v, torch.arange(3), into)
        # Of the replay the mean alone, of the draw both.
        (out[1].sum() + out[2].square().mean() + out[-1].square().mean()).backward()
        assert torch.equal(into, out[0]) and torch.equal(out[1], out[-2])
        results.append([x.detach() for x in out] + [v.grad])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_and_kept_wide(dtype, backend, instruction_sets):
    """The bits of a draw that is stored in the dtype and read again, and their log-probability."""
    arguments, keyed = problem((3, 5, 700), dtype=dtype, uncond=True), key(3)
    for round_dtype in (torch.bfloat16, torch.float16):
        for _ in instruction_sets():
            given = arguments | keyed | {"backend": backend}
            rounded, log_prob = fk.sde_step(
                **given, out_dtype=torch.float32, round_dtype=round_dtype
            )
            stored, expected = fk.sde_step(**given, out_dtype=round_dtype)
            assert rounded.dtype == torch.float32 and torch.equal(rounded, stored.float())
            assert torch.equal(log_prob, expected)
            keep = {n: v for n, v in arguments.items() if n != "velocity"}
            again = fk.sde_log_prob(
                velocity=arguments["velocity"], x_next=rounded, **keep, backend=backend
            )
            assert torch.equal(again, log_prob)
    same = fk.sde_step(**arguments, **keyed, round_dtype=dtype, backend=backend)  # as it is stored
    assert all(map(torch.equal, same, fk.sde_step(**arguments, **keyed, backend=backend)))


def test_round_dtypes_that_make_no_sense_are_refused(backend):
    half = problem((2, 8), dtype=torch.float16)
    for round_dtype, stored in (
        (torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
    ):  # fmt: skip
        stored = stored or torch.float16
        with pytest.raises(ValueError, match=f"^round_dtype: x_next is stored in {stored}, which"):
            fk.sde_step(
                **half, **key(2), out_dtype=stored, round_dtype=round_dtype, backend=backend
            )
    for odd in (torch.int32, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(TypeError, match=f"^round_dtype: expected float32.*got {odd}"):
            fk.sde_step(**half, **key(2), round_dtype=odd, backend=backend)
    wide = double(problem((2, 8)))
    x_next, _ = fk.sde_step(**wide, noise=noise_of(wide).double(), round_dtype=torch.float32)
    assert x_next.dtype == torch.float64 and torch.equal(x_next, x_next.float().double())


# ---- the deterministic step ----


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_ode_step_with_history(dtype):
    for order in (1, 2, 3):
        arguments = problem((3, 4, 33), dtype=dtype, history=order - 1)
        history = arguments.pop("history", [])
        m = multistep_coefficients((0.9, 0.8, 0.7, 0.6), order)
        x_t, velocity = arguments["x_t"].double(), arguments["velocity"].double()
        expected = (
            m.a * x_t
            + m.b * velocity
            + sum(w * h.double() for w, h in zip(m.history, history, strict=False))
        )
        x_next, x0 = fk.ode_step(
            arguments["x_t"], arguments["velocity"], m, history=history, return_x0=True
        )
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(x_next.double(), expected, **tolerance)
        torch.testing.assert_close(x0.double(), x_t - 0.7 * velocity, **tolerance)
        if dtype != torch.float64:
            reference = fk.ode_step(
                arguments["x_t"],
                arguments["velocity"],
                m,
                history=history,
                return_x0=True,
                backend="reference",
            )
            assert torch.equal(x_next, reference[0]) and torch.equal(x0, reference[1])


# ---- outputs, devices, backends, compilers ----


def in_place(call, arguments, name, **options):
    """`call`, all of its results, with `out` a copy of the argument `name`."""
    out = arguments[name].clone()
    results = call(**arguments | {name: out}, out=out, **options)
    assert results[0] is out
    return results


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("uncond", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draw_in_place_is_the_draw(dtype, uncond, history, backend, instruction_sets):
    """x_next, log_prob and x0 have the bits of a draw into new memory, where `out` is an input."""
    for _ in instruction_sets():
        for shape in ((3, 4, 16, 16), (2, 1), (2, 1061), (1, 17_000)):
            step = problem(shape, dtype=dtype, uncond=uncond, history=history)
            given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            more = {"return_mean": True}
            if dtype == torch.float32:
                more["round_dtype"] = torch.bfloat16
            for noise, names in (
                (key(shape[0]), ("x_t", "velocity")),
                ({"noise": given}, ("x_t", "velocity", "noise")),
                ({"noise": given} | more, ("x_t", "velocity", "noise")),
            ):
                options = step | noise
                expected = fk.sde_step(**options, backend=backend)
                out = torch.full_like(expected[0], torch.nan)
                into = fk.sde_step(**options, out=out, backend=backend)
                assert into[0] is out and all(map(torch.equal, into, expected))
                for name in names:
                    got = in_place(fk.sde_step, options, name, backend=backend)
                    assert all(map(torch.equal, got, expected)), name
            step["m_rows"] = step.pop("c_rows")
            expected = fk.ode_step(**step, return_x0=True, backend=backend)
            for name in ("x_t", "velocity"):
                got = in_place(fk.ode_step, step, name, return_x0=True, backend=backend)
                assert all(map(torch.equal, got, expected)), name


def test_compiled_draws_in_place(backend):
    arguments = problem((3, 4, 33))
    rows = arguments["c_rows"].to(dtype=torch.float32)

    def draw(x, v):
        return fk.sde_step(x, v, rows, **key(3), out=x, backend=backend)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    results = [run(arguments["x_t"].clone(), arguments["velocity"]) for run in (draw, compiled)]
    assert all(map(torch.equal, *results))


def test_named_backend_serves_or_refuses():
    arguments = problem((2, 8))
    with pytest.raises(
        fk.BackendError, match="backend='native' cannot serve torch.float64.*reference"
    ):
        fk.sde_step(**double(arguments), noise=noise_of(arguments).double(), backend="native")
    with pytest.raises(
        ValueError,
        match=r"backend: expected one of \['native', 'triton', 'reference'\].*got 'cuda'",
    ):
        fk.sde_step(**arguments, **key(2), backend="cuda")
    if fk.backends("cpu")["triton"] is not None:
        with pytest.raises(fk.BackendError, match="backend='triton' cannot serve"):
            fk.sde_step(**arguments, **key(2), backend="triton")
    assert (
        set(fk.backends()) == {"reference", "triton", "native"}
        and fk.backends()["reference"] is None
    )


def test_without_native_kernels_the_reference_serves_and_the_reason_is_told(monkeypatch, request):
    monkeypatch.setattr(native, "_load", lambda: (None, "the native kernels are not built"))
    choose.cache_clear()
    request.addfinalizer(choose.cache_clear)
    arguments = problem((2, 8))
    x_next, _ = fk.sde_step(**arguments, **key(2))
    assert torch.equal(x_next, fk.sde_step(**arguments, **key(2), backend="reference")[0])
    with pytest.raises(fk.BackendError, match="the native kernels are not built"):
        fk.sde_step(**arguments, **key(2), backend="native")
    assert "not built" in fk.backends()["native"]


def test_opcheck(backend):
    arguments = problem((3, 4, 33), uncond=True)
    table = arguments["c_rows"].table.float()
    x, v, u = arguments["x_t"], arguments["velocity"], arguments["velocity_uncond"]
    k = key(3)
    draw = (x, v, table, u, 4.5, [torch.randn_like(x)], None, 3, k["sample_id"], None, 4)
    outputs = (torch.empty_like(x), torch.empty(3), torch.empty_like(x), torch.empty_like(x))
    torch.library.opcheck(torch.ops.flowkern.sde_draw, (*draw, *outputs, torch.bfloat16, backend))
    replay = (x, v.clone().requires_grad_(), torch.randn_like(x), table, u, 4.5, backend)
    torch.library.opcheck(torch.ops.flowkern.sde_log_prob, replay)
    torch.library.opcheck(
        torch.ops.flowkern.sde_log_prob_backward,
        (torch.ones(3), *[t.detach() if isinstance(t, torch.Tensor) else t for t in replay]),
    )
    torch.library.opcheck(torch.ops.flowkern.sde_log_prob_and_mean, replay)
    of = (torch.randn_like(x), torch.randn_like(x), table)  # x_next, mean, edges
    attached = (v.clone().requires_grad_(), torch.ones(3), of[1], of[0], table, 4.5, backend)
    torch.library.opcheck(torch.ops.flowkern.sde_attach, attached)
    for grads in ((torch.ones(3), None), (None, torch.randn_like(x))):
        given = (*grads, *of, 4.5, torch.bfloat16, backend)
        torch.library.opcheck(torch.ops.flowkern.sde_mean_backward, given)


def test_compiles_whole_forward_and_backward(backend):
    arguments = problem((3, 4, 33))
    rows = arguments["c_rows"].to(dtype=torch.float32)

    def train(x, v, ids):
        x_next, drawn = fk.sde_step(
            x, v.detach(), rows, seed=5, sample_id=ids, step=2, backend=backend
        )
        return x_next, drawn, fk.sde_log_prob(x, v * 1.0, x_next, rows, backend=backend)

    ids = torch.arange(3)
    results = []
    for run in (train, torch.compile(train, fullgraph=True, backend="aot_eager")):
        v = arguments["velocity"].clone().requires_grad_()
        x_next, drawn, replayed = run(arguments["x_t"], v, ids)
        replayed.sum().backward()
        results.append((x_next, drawn, replayed.detach(), v.grad))
        assert torch.equal(drawn, replayed)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# ---- bad input ----


def test_errors_name_the_argument():
    good = problem((2, 3, 4)) | key(2)
    cases = [
        (
            {"velocity": torch.randn(2, 3, 5)},
            ValueError,
            r"velocity: expected shape \(2, 3, 4\), got \(2, 3, 5\)",
        ),
        (
            {"velocity": torch.randn(1, 3, 4)},
            ValueError,
            "velocity: expected shape",
        ),  # no silent broadcast
        (
            {"velocity": torch.ones(2, 3, 4, dtype=torch.int64)},
            TypeError,
            "velocity: expected float32.*torch.int64",
        ),
        (
            {"velocity": torch.randn(2, 3, 4, device="meta")},
            ValueError,
            "velocity: expected device cpu, got meta",
        ),
        ({"x_t": torch.randn(3)}, ValueError, r"x_t: expected shape \(B, \*D\)"),
        ({"x_t": [1.0]}, TypeError, "x_t: expected a tensor, got list"),
        (
            {"c_rows": good["c_rows"].table},
            TypeError,
            "c_rows: expected flowkern.schedules.Coefficients, got Tensor",
        ),
        (
            {"c_rows": good["c_rows"][torch.tensor([0, 0, 1])]},
            ValueError,
            "c_rows: expected a single edge or 2, one per sample; got 3",
        ),
        ({"sample_id": None}, ValueError, "sample_id: got None; expected noise, or all of"),
        (
            {"sample_id": torch.arange(3)},
            ValueError,
            r"sample_id: expected shape \(2,\), got \(3,\)",
        ),
        ({"step": -1}, ValueError, "step: expected 0 <= step"),
        ({"noise": torch.randn(2, 3, 4)}, ValueError, "noise: given together with"),
        ({"guidance_scale": 2.0}, ValueError, "velocity_uncond: needed for guidance_scale=2.0"),
        ({"velocity_uncond": torch.randn(2, 4)}, ValueError, "velocity_uncond: expected shape"),
        ({"history": [torch.randn(2, 3)]}, ValueError, r"history\[0\]: expected shape"),
        ({"history": [torch.randn(2, 3, 4)] * 4}, ValueError, "history: .* got 4"),
        (
            {"c_rows": multistep_coefficients((0.9, 0.8, 0.7), 2)},
            ValueError,
            "history: c_rows weigh 1 earlier",
        ),
        ({"out": torch.empty(2, 3)}, ValueError, "out: expected shape"),
        (
            {"out": torch.empty(4, 3, 2).transpose(0, 2)},
            ValueError,
            "out: expected a contiguous tensor",
        ),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype: expected"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            fk.sde_step(**good | change)
    with pytest.raises(ValueError, match="x_next: expected shape"):
        fk.sde_log_prob(good["x_t"], good["velocity"], torch.randn(2, 3), good["c_rows"])


def test_nan_stays_where_it_is(backend):
    """A NaN latent poisons its own sample's log-probability and no other's."""
    arguments = problem((3, 5, 700))
    arguments["velocity"][1, 2, 3] = float("nan")
    x_next, log_prob = fk.sde_step(**arguments, **key(3), backend=backend)
    assert x_next.isnan().sum() == 1 and log_prob.isnan().tolist() == [False, True, False]
