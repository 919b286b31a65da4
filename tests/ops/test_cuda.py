"""The native CUDA kernels held to the reference, behind the Python that launches them.

On a device where there is one, and on any CPU: their sources compiled as C++ with cuda_on_cpu.h.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from calls import BY_NAME, KEEPING, REPLAYS, Problem, take, twice

import flowkern as fk
from flowkern.ops._common import loss_op, native, philox
from flowkern.ops._common.dispatch import Impl, no_objection
from flowkern.ops.matching_loss import api as matching_api
from flowkern.ops.matching_loss import native_impl as matching_native
from flowkern.ops.policy_loss import api as policy_api
from flowkern.ops.policy_loss import native_impl as policy_native
from flowkern.ops.sde_step import api as step_api
from flowkern.ops.sde_step import native_impl as step_native
from flowkern.ops.sde_step import operators as step_operators
from flowkern.ops.sde_step.inputs import StepOutputs
from flowkern.schedules import multistep_coefficients, sd3_sigmas, step_coefficients

pytest.importorskip("pybind11")
import builds

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MULTISTEP = multistep_coefficients(sd3_sigmas(10)[2:6], 3).to("cpu", torch.float32)
GRID = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7).to("cpu", torch.float32)
# Less than a group, a warp; whole groups, an odd tail; several tiles, the last one whole or not.
SIZES = (1, 7, 64, 250, 1024, 2053, 5120)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs g++ on x86-64")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    library = folder / "_cuda.so"
    subprocess.run([compiler, "-shared", *builds.cuda_on_cpu(), "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# What `backend="native"` is to mean, by the table that it is looked up in.
TABLES = (
    (step_operators, "DRAW", step_native.draw),
    (step_operators, "REPLAY", step_native.replay),
    (step_operators, "REPLAY_MEAN", step_native.replay_mean),
    (step_operators, "REPLAY_BACKWARD", step_native.replay_backward),
    (step_operators, "MEAN_BACKWARD", step_native.mean_backward),
    (step_operators, "GRADIENT", step_native.replay_backward),
    (step_operators, "MEAN_GRADIENT", step_native.mean_backward),
    (philox, "_IMPLS", philox._native_normal),
    (policy_api.LOSS, "impls", policy_native.forward),
    (policy_api.LOSS, "forwards", policy_native.forward),
    (policy_api.LOSS, "backwards", policy_native.backward),
    (matching_api.LOSS, "impls", matching_native.forward),
    (matching_api.LOSS, "forwards", matching_native.forward),
    (matching_api.LOSS, "backwards", matching_native.backward),
    (matching_api, "_ADD_NOISE", matching_native.add_noise),
)


@contextlib.contextmanager
def native_is(monkeypatch, wrap=lambda call: call, straight=None):
    """straight: the kernels of the way that checks nothing in Python."""
    with monkeypatch.context() as patch:
        for api in (step_api, loss_op, matching_api):
            given = lambda backend, like: straight if backend == "native" else None  # noqa: E731
            patch.setattr(api, "direct", given)
        for api, name, call in TABLES:
            if isinstance(getattr(api, name), dict):
                patch.setitem(getattr(api, name), "native", wrap(call))
            else:
                patch.setattr(api, name, (Impl("native", wrap(call), no_objection),))
        yield patch


@pytest.fixture(params=["emulated", "straight", pytest.param("device", marks=pytest.mark.gpu)])
def kernels(request, monkeypatch):
    """A context in which backend="native" means the CUDA kernels, for tensors of the CPU: by the
    way that checks in Python first ("emulated"), or where it can be by the straight one.
    """
    if request.param == "device":
        reason = fk.backends("cuda")["native"]
        if reason is not None:
            pytest.skip(reason)
        return lambda: native_is(monkeypatch, on_device)
    module = request.getfixturevalue("module")
    counts = torch.zeros(2**14, dtype=torch.int32)

    def memory(index, stream, floats, needed, is_captured):  # sums start as rubbish
        return torch.full((floats,), torch.nan), counts[:needed]

    native.connect(
        module, native.private.exchange, native._CPU, stream=lambda index: 0, scratch=memory
    )
    straight = module if request.param == "straight" else None

    @contextlib.contextmanager
    def emulated():
        with native_is(monkeypatch, straight=straight) as patch:
            patch.setattr(native, "of", lambda x: module)
            yield
        module.forget()
        assert not counts.any()  # kernels leave them zero

    return emulated


def on_device(call, device="cuda"):
    """`call` with every tensor among its arguments on a device, and back, in the same layout."""

    def moved(value):
        if isinstance(value, torch.Tensor):
            there = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )
            return there.copy_(value.detach())
        if hasattr(value, "_make"):
            return value._make(map(moved, value))
        if isinstance(value, list | tuple):
            return type(value)(map(moved, value))
        return torch.device(device) if isinstance(value, torch.device) else value

    def there_and_back(*args):
        there = [moved(value) for value in args]
        result = call(*there)
        for value, copy in zip(written(args), written(there), strict=True):
            value.detach().copy_(copy)
        back = lambda x: x.cpu() if isinstance(x, torch.Tensor) else x  # noqa: E731
        return tuple(map(back, result)) if isinstance(result, tuple) else back(result)

    return there_and_back


def written(arguments):
    """The tensors among them that a call may write."""
    for value in arguments:
        outputs = value if isinstance(value, StepOutputs) else (value,)
        yield from (x for x in outputs if isinstance(x, torch.Tensor))


def latent(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key(batch):
    return {"seed": 2**63 + 11, "sample_id": torch.arange(batch) * 2**33 + 5, "step": 4}


def apart(x):
    """The same values where samples lie an odd number of elements apart: no 128-bit access fits."""
    wide = torch.empty(x.shape[0], x[0].numel() + 3, dtype=x.dtype)
    wide[:, 1:-2] = x.flatten(1)
    return wide[:, 1:-2].unflatten(1, x.shape[1:])


# ---- the step ----


def step_problem(size, dtype, uncond=False, history=0, batch=3):
    arguments = {
        "x_t": latent(batch, size, dtype=dtype, seed=1),
        "velocity": latent(batch, size, dtype=dtype, seed=2),
        "c_rows": GRID[torch.arange(batch) % 9],
    }
    if uncond:
        arguments |= {"velocity_uncond": latent(batch, size, dtype=dtype, seed=3)}
        arguments |= {"guidance_scale": 4.5}
    if history:
        arguments["c_rows"] = MULTISTEP
        arguments["history"] = [
            latent(batch, size, dtype=dtype, seed=4 + j) for j in range(history)
        ]
    return arguments


def test_noise_has_the_bits_of_the_reference(kernels):
    ids, steps = torch.tensor([0, 2**40 + 5, -3]), torch.tensor([0, 2**28 - 1, 5])
    for size, step in itertools.product(SIZES, (steps, 7)):
        expected = fk.philox_normal((3, size), -1, ids, step, "match", backend="reference")
        with kernels():
            got = fk.philox_normal((3, size), -1, ids, step, "match", backend="native")
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_draw_rounds_as_the_reference(kernels, size, dtype):
    for uncond, history, given in ((False, 0, False), (True, 0, True), (True, 3, False)):
        arguments = step_problem(size, dtype, uncond, history)
        noise = {"noise": latent(3, size, dtype=dtype, seed=9)} if given else key(3)
        for out_dtype in (dtype, torch.float32):
            call = arguments | noise | {"out_dtype": out_dtype}
            expected, expected_log_prob = fk.sde_step(**call, backend="reference")
            with kernels():
                got, log_prob = fk.sde_step(**call, backend="native")
            assert torch.equal(got, expected)
            torch.testing.assert_close(log_prob, expected_log_prob, rtol=2e-6, atol=2e-7)


def test_ode_step_and_std_zero_ignore_the_noise(kernels):
    arguments = step_problem(300, torch.bfloat16, history=2)
    arguments.pop("c_rows")
    m_rows = MULTISTEP
    expected = fk.ode_step(**arguments, m_rows=m_rows, return_x0=True, backend="reference")
    euler = step_coefficients(sd3_sigmas(10), "ode", 0)[3].to("cpu", torch.float32)
    plain = {"x_t": arguments["x_t"], "velocity": arguments["velocity"]}
    nowhere = torch.full_like(plain["x_t"], torch.nan)
    exact, _ = fk.sde_step(**plain, c_rows=euler, noise=nowhere, backend="reference")
    with kernels():
        got = fk.ode_step(**arguments, m_rows=m_rows, return_x0=True, backend="native")
        drawn, log_prob = fk.sde_step(**plain, c_rows=euler, noise=nowhere, backend="native")
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(drawn, exact) and (log_prob == 0).all()


@pytest.mark.parametrize("backwards", [False, True])
def test_replay_has_the_bits_of_the_draw_in_any_split_layout_and_order(
    kernels, monkeypatch, backwards
):
    for size, dtype in itertools.product((7, 2053, 5120), DTYPES):
        arguments = step_problem(size, dtype, uncond=True)
        with kernels():
            x_next, log_prob = fk.sde_step(**arguments, **key(3), backend="native")
            if backwards:  # blocks run, and so arrive, the other way round
                monkeypatch.setenv("CUDA_ON_CPU_BACKWARDS", "1")
            names = ("x_t", "velocity", "velocity_uncond")
            for cut in (slice(0, 3), slice(1, 2), slice(1, 3)):
                part = {n: arguments[n][cut] for n in names} | {"x_next": x_next[cut]}
                part |= {"c_rows": arguments["c_rows"][torch.arange(3)[cut]], "guidance_scale": 4.5}
                assert torch.equal(fk.sde_log_prob(**part, backend="native"), log_prob[cut])
                part |= {n: apart(part[n]) for n in (*names, "x_next")}
                assert torch.equal(fk.sde_log_prob(**part, backend="native"), log_prob[cut])
            monkeypatch.delenv("CUDA_ON_CPU_BACKWARDS", raising=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_replay(kernels, dtype):
    for size, uncond in itertools.product(SIZES, (False, True)):
        arguments = step_problem(size, dtype, uncond)
        x_next, _ = fk.sde_step(**arguments, **key(3), backend="reference")
        arguments["velocity"].requires_grad_()

        def gradient(backend, arguments=arguments, x_next=x_next):
            log_prob = fk.sde_log_prob(**arguments, x_next=x_next, backend=backend)
            weight = torch.tensor([1.0, -2.0, 0.0])
            return torch.autograd.grad((log_prob * weight).sum(), arguments["velocity"])[0]

        expected = gradient("reference")
        with kernels():
            got = gradient("native")
        assert got.dtype == dtype and (got[2] == 0).all()
        close_gradients(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_and_the_gradient_of_both(kernels, dtype):
    """Of a draw and its replay, x_next rounded and not; one gradient missing, the other, none."""
    for size, (uncond, history) in itertools.product(SIZES, ((False, 0), (True, 0), (True, 3))):
        arguments = step_problem(size, dtype, uncond, history)
        arguments["velocity"].requires_grad_()
        weights = torch.tensor([1.0, -2.0, 0.0]), latent(3, size, seed=8) / size

        def run(backend, size=size, arguments=arguments, weights=weights, history=history):
            round_dtype = torch.float16 if size % 2 else None
            call = {"noise": latent(3, size, seed=9), "out_dtype": torch.float32}
            call |= {"round_dtype": round_dtype, "return_mean": True, "backend": backend}
            results = [fk.sde_step(**arguments, **call)]
            if not history:
                call = {"x_next": results[0][0], "return_mean": True, "backend": backend}
                results.append((call["x_next"], *fk.sde_log_prob(**arguments, **call)))
            gradients = [
                torch.autograd.grad(
                    [log_prob, mean][j], arguments["velocity"], weights[j], retain_graph=True
                )[0]
                for _, log_prob, mean in results
                for j in (0, 1)
            ]
            gradients += [
                torch.autograd.grad((log_prob, mean), arguments["velocity"], weights)[0]
                for _, log_prob, mean in results
            ]
            return results, gradients

        expected, wanted = run("reference")
        with kernels():
            got, gradients = run("native")
        for (x, log_prob, mean), (true_x, true_log_prob, true_mean) in zip(
            got, expected, strict=True
        ):
            assert torch.equal(x, true_x) and torch.equal(mean, true_mean)
            torch.testing.assert_close(log_prob, true_log_prob, rtol=2e-6, atol=2e-7)
        assert history or torch.equal(got[0][1], got[1][1])
        for have, want in zip(gradients, wanted, strict=True):
            assert have.dtype == dtype
            close_gradients(have, want)


def close_gradients(got, expected):
    """A rounding in the gradient's dtype, or a few of float32 in what is cancelled."""
    kind = torch.finfo(expected.dtype)
    allowed = 2e-6 * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        got, expected, rtol=kind.eps, atol=allowed + kind.smallest_normal * kind.eps
    )


# ---- the losses ----

CALLS = take(("held to the reference's bits", lambda call: not call.verb.endswith("_loss")))
# The velocity row of each sample: one each, siblings in turn, in a row, and rows without samples.
ROWS = {
    "one each": (4, None),
    "in turn": (3, [0, 1, 2, 0, 1, 2, 0]),
    "in blocks": (3, [0, 0, 0, 0, 1, 2, 2]),
    "one for all": (1, [0] * 70),
    "empty": (5, [3, 3, 1]),
}
SIBLINGS = ["policy_loss", "policy_loss, siblings, all", "policy_loss, guard, KL"]
SIBLINGS += ["matching_loss", "matching_loss, anchors", "matching_loss, nft, all"]


def both(kernels, verb, velocity, arguments, grad=None):
    """(fields, gradient) by the reference and by the CUDA kernels."""
    results = []
    for backend, context in (("reference", contextlib.nullcontext), ("native", kernels)):
        leaf = velocity.detach().clone().requires_grad_()
        with context():
            out = verb(leaf, **arguments, backend=backend)
            loss = out.loss if grad is None else (out.loss * grad).sum()
            gradient = torch.autograd.grad(loss * 1.5, leaf)[0]
        results.append((out, gradient))
    return results


def assert_same(results, tolerance):
    (expected, expected_gradient), (got, gradient) = results
    for name, want in expected._asdict().items():
        have = getattr(got, name)
        if want.dtype == torch.bool:
            assert torch.equal(have, want), name
        else:
            torch.testing.assert_close(
                have, want, rtol=1e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert gradient.dtype == expected_gradient.dtype
    close_gradients(gradient, expected_gradient)


def policy_problem(rows, row, size, dtype, drift=0.3):
    batch = rows if row is None else len(row)
    of_row = torch.arange(rows) if row is None else torch.tensor(row)
    x_t, old = latent(rows, size, dtype=dtype, seed=1), latent(rows, size, dtype=dtype, seed=2)
    edges = GRID[torch.arange(batch) % 9]
    x_next, _ = fk.sde_step(
        x_t[of_row], old[of_row], edges, noise=latent(batch, size, seed=3), backend="reference"
    )
    velocity = (old + drift * latent(rows, size, seed=4)).to(dtype)
    arguments = {"x_t": x_t, "x_next": x_next, "c_rows": edges, "advantage": latent(batch, seed=5)}
    if row is not None:
        arguments["row"] = of_row
    return velocity, arguments | {"old_velocity": old, "clip_low": 5e-3, "clip_high": 1e-2}


def check(kernels, p, **change):
    """Statistics and gradient of a loss are the reference's, but for a few roundings."""
    expected = p.run("reference", **change)
    with kernels():
        got = p.run("native", **change)
    for have, want in zip(got[:-1], expected[:-1], strict=True):
        if want.dtype == torch.bool:
            assert torch.equal(have, want)
        else:
            atol = 3e-6 if p.call.verb == "policy_loss" else 1e-5
            torch.testing.assert_close(have, want, rtol=1e-5, atol=atol)
    assert got[-1].dtype == expected[-1].dtype
    close_gradients(got[-1], expected[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_losses(kernels, call, dtype):
    for size in (5, 1024, 2053):
        check(kernels, Problem(call, 3, size, dtype))


# A replay keeps it on the straight way alone; on a device test_gpu.py looks.
KEPT = [("emulated", call) for call in KEEPING]
KEPT += [("straight", call) for call in (*KEEPING, *REPLAYS)]


@pytest.mark.parametrize("kernels, call", KEPT, indirect=["kernels"], ids=str)
def test_the_residual_kept_forward_is_the_gradient_once(kernels, call):
    for size in (5, 2053):
        p = Problem(call, 3, size)
        with kernels():
            twice(p, "native")


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_siblings_some_of_them_clipped(kernels, monkeypatch, layout, dtype):
    if dtype == torch.bfloat16:
        monkeypatch.setenv("CUDA_ON_CPU_BACKWARDS", "1")
    rows, row = ROWS[layout]
    row = None if row is None else torch.tensor(row)
    for name in SIBLINGS:
        for size in (5, 2053) if layout != "one for all" else (260,):
            p = Problem(BY_NAME[name].but(row=row), rows, size, dtype)
            check(kernels, p, clip_low=0.005, clip_high=0.01)


def test_many_samples(kernels, monkeypatch):
    """More than are looked through, or added up, in one loop: sorted by their rows, whose order is
    no order, some without any and one with most; and as many rows as samples.
    """
    generator = torch.Generator().manual_seed(0)
    crowded = torch.randint(0, 40, (2500,), generator=generator) ** 2 % 40
    for row in (None, torch.where(torch.rand(2500, generator=generator) < 0.6, 7, crowded)):
        rows, size = (2500, 3) if row is None else (40, 40)
        of_row = None if row is None else row.tolist()
        velocity, arguments = policy_problem(rows, of_row, size, torch.float32)
        arguments |= {"clip_low": 0.9, "clip_high": 9.0}
        (expected, wanted), (got, gradient) = both(kernels, fk.policy_loss, velocity, arguments)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.log_ratio, expected.log_ratio, rtol=1e-5, atol=3e-6)
        close_gradients(gradient, wanted)
        monkeypatch.setenv("CUDA_ON_CPU_BACKWARDS", "1")
        again = both(kernels, fk.policy_loss, velocity, arguments)[1]
        monkeypatch.delenv("CUDA_ON_CPU_BACKWARDS")
        assert torch.equal(again[0].loss, got.loss) and torch.equal(again[1], gradient)


def test_no_loop_runs_over_all_samples(kernels, request):
    """What 5,000 samples cost a thread in turns of its loops, when no row has more than eight."""
    if "device" in request.node.name:
        pytest.skip("counted on a CPU")
    steps = ctypes.CDLL(request.getfixturevalue("module").__file__).cuda_on_cpu_most_steps
    for batch in (700, 5000):
        row = torch.arange(batch).flip(0) // 8
        velocity, arguments = policy_problem(batch // 8 + 1, row.tolist(), 3, torch.float32)
        steps()
        both(kernels, fk.policy_loss, velocity, arguments)
        # A loss adds up 1,024 samples in 32 turns; as many are looked through in as many.
        assert steps() <= {700: 3 * 22 + 8, 5000: 32 + 12}[batch]


def test_policy_loss_from_recorded_log_probs_and_on_policy_is_exact(kernels):
    velocity, arguments = policy_problem(3, None, 2053, torch.float32, drift=0.0)
    c = arguments["c_rows"]
    with kernels():
        step = (arguments["x_t"], velocity, arguments["x_next"], c)
        recorded = fk.sde_log_prob(*step, backend="native")
        same = fk.policy_loss(velocity, **arguments, backend="native")
        arguments |= {"old_velocity": None, "old_log_prob": recorded}
        kept = fk.policy_loss(velocity, **arguments, backend="native")
    assert (same.log_ratio == 0).all() and (same.ratio == 1).all()
    assert (kept.log_ratio == 0).all() and (kept.ratio == 1).all()
    assert_same(both(kernels, fk.policy_loss, velocity + 0.01, arguments), 1e-5)


def test_policy_sums_do_not_depend_on_the_batch_or_its_order(kernels, monkeypatch):
    velocity, arguments = policy_problem(3, ROWS["in turn"][1], 2053, torch.bfloat16)
    with kernels():
        whole = fk.policy_loss(velocity, **arguments, reduction="none", backend="native")
        monkeypatch.setenv("CUDA_ON_CPU_BACKWARDS", "1")
        again = fk.policy_loss(velocity, **arguments, reduction="none", backend="native")
        assert all(map(torch.equal, whole, again))
        for b in range(7):
            names = ("x_next", "advantage")
            row = int(arguments["row"][b])
            alone = {n: arguments[n][b : b + 1] for n in names} | {"row": None}
            alone |= {n: arguments[n][row : row + 1] for n in ("x_t", "old_velocity")}
            alone["c_rows"] = arguments["c_rows"][torch.tensor([b])]
            got = fk.policy_loss(
                velocity[row : row + 1], **arguments | alone, reduction="none", backend="native"
            )
            assert torch.equal(got.log_ratio, whole.log_ratio[b : b + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_noise_rounds_as_the_reference(kernels, dtype):
    for size in SIZES:
        x0, sigma = latent(3, size, dtype=dtype, seed=1), torch.tensor([0.0, 0.3, 1.0])
        for noise in (key(3), {"noise": latent(3, size, seed=2)}):
            expected = fk.add_noise(x0, sigma, **noise, backend="reference")
            with kernels():
                assert torch.equal(fk.add_noise(x0, sigma, **noise, backend="native"), expected)
                if size > 1:
                    spread = fk.add_noise(apart(x0), sigma, **noise, backend="native")
                    assert torch.equal(spread, expected)


def test_redrawn_where_std_is_zero_the_noise_is_ignored(kernels):
    velocity, arguments = policy_problem(3, None, 2053, torch.float32)
    euler = step_coefficients(sd3_sigmas(10), "ode", 0)[3].to("cpu", torch.float32)
    noise = torch.full((3, 2053), torch.nan)
    arguments |= {"x_next": None, "c_rows": euler, "noise": noise}
    results = both(kernels, fk.policy_loss, velocity, arguments)
    assert_same(results, 0)
    assert results[1][0].loss.isfinite()


@pytest.mark.parametrize("first", [0, 1, 4])
def test_any_alignment(kernels, first):
    """A batch of one has no stride to tell by: only its address."""
    whole = step_problem(1100, torch.float32, batch=1)
    part = {n: whole[n][:, first:] for n in ("x_t", "velocity")} | {"c_rows": whole["c_rows"]}
    expected, _ = fk.sde_step(**part, **key(1), backend="reference")
    with kernels():
        assert torch.equal(fk.sde_step(**part, **key(1), backend="native")[0], expected)


def test_rows_out_of_range_are_loud_and_leave_nothing_behind(kernels, monkeypatch):
    """On a device rows are not looked at before the launch."""
    velocity, arguments = policy_problem(3, ROWS["in turn"][1], 2053, torch.float32)
    monkeypatch.setattr(policy_api, "check_index", lambda name, index, count, device: index)
    arguments["row"] = torch.tensor([0, 1, 2, 0, 1, 99, -5])
    with kernels():
        out = fk.policy_loss(velocity, **arguments, backend="native")
    assert out.loss.isnan()


def test_empty_batches_and_samples(kernels):
    velocity, arguments = policy_problem(2, None, 4, torch.float32)
    arguments |= {"advantage": torch.zeros(2)}
    empty = {n: arguments[n][:, :0] for n in ("x_t", "x_next", "old_velocity")}
    assert_same(both(kernels, fk.policy_loss, velocity[:, :0], arguments | empty), 0)
    none = {n: arguments[n][:0] for n in ("x_t", "x_next", "old_velocity", "advantage")}
    none["c_rows"] = GRID[3]
    with kernels():
        assert fk.policy_loss(velocity[:0], **arguments | none, backend="native").loss == 0
        nothing = fk.matching_loss(
            velocity[:0], velocity[:0], 0.5, torch.zeros(0), **key(0), backend="native"
        )
    assert nothing.loss == 0
