"""The Triton kernels of the losses against the reference in float64, and their laws.

On a GPU, or in Triton's interpreter, where test_triton_interpreted.py runs this file.
"""

import collections

import interpreter
import pytest
import torch
from calls import BY_NAME, GIVEN, KEEPING, Problem, take, twice
from interpreter import DEVICE, INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern as fk
from flowkern.ops.matching_loss import add_noise, matching_loss
from flowkern.schedules import Coefficients, sd3_sigmas, step_coefficients

pytestmark = pytest.mark.gpu
interpreter.require()

from flowkern.ops._common import loss_triton, rows_triton  # noqa: E402
from flowkern.ops.matching_loss import triton_impl as matching  # noqa: E402
from flowkern.ops.matching_loss.inputs import MatchingInputs  # noqa: E402
from flowkern.ops.policy_loss import triton_impl as policy  # noqa: E402
from flowkern.ops.policy_loss.inputs import PolicyInputs  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRID = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7).to(DEVICE, torch.float32)
ROW = torch.tensor([1, 0, 1, 1], device=DEVICE)  # row 2 of three has no sample


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks per sample at small sizes, for the interpreter; a GPU runs what users run."""
    if INTERPRETED:
        monkeypatch.setattr(rows_triton, "tile", lambda *_: (256, 1))


@pytest.fixture(autouse=True)
def arrivals(monkeypatch):
    """Kernels leave the counters at 0: one set serves every launch of a test, as on a GPU."""
    kept = torch.zeros(1024, dtype=torch.int32, device=DEVICE)
    sums = torch.empty(2**16, dtype=torch.float64, device=DEVICE)
    monkeypatch.setattr(loss_triton, "scratch", lambda *_: (sums, kept))
    yield
    assert not kept.any()


def latent(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def per_sample(batch, seed=0):
    return latent(batch, seed=100 + seed)


def key(batch):
    return {"seed": 3, "sample_id": torch.arange(batch, device=DEVICE) * 977 + 5, "step": 4}


def policy_problem(batch, *size, dtype=torch.float32, row=None, drift=0.1, **more):
    """Arguments of policy_loss as keywords: off policy, so that some samples are clipped."""
    rows = batch if row is None else 3
    old = latent(rows, *size, dtype=dtype, seed=2)
    arguments = {
        "velocity": (old.float() + drift * latent(rows, *size, seed=3)).to(dtype),
        "x_t": latent(rows, *size, dtype=dtype, seed=1),
        "x_next": latent(batch, *size, dtype=dtype, seed=4),
        "c_rows": GRID[torch.arange(batch, device=DEVICE) % 9],
        "advantage": per_sample(batch),
        "row": row,
        "old_velocity": old,
    }
    return arguments | _of_rows(rows, more)


def _of_rows(rows, more):
    anchors = ("velocity_ref", "velocity_ema", "velocity_uncond")
    return {name: x[:rows] if name in anchors else x for name, x in more.items()}


def matching_problem(batch, *size, dtype=torch.float32, row=None, drift=0.1, **more):
    rows = batch if row is None else 3
    old = latent(rows, *size, dtype=dtype, seed=2)
    arguments = {
        "velocity": (old.float() + drift * latent(rows, *size, seed=3)).to(dtype),
        "x0": latent(batch, *size, dtype=dtype, seed=1),
        "sigma": torch.linspace(0.1, 1, batch, device=DEVICE),
        "advantage": per_sample(batch).clamp(-1, 1),
        "row": row,
        "noise": latent(batch, *size, seed=4),
        "old_velocity": old,
        "clip_low": 0.01,
        "clip_high": 0.01,
    }
    return arguments | _of_rows(rows, more)


def differentiated(loss, arguments, weight, **more):
    """The fields of a loss, and its gradient."""
    arguments = {"backend": "triton"} | arguments | more
    velocity = arguments["velocity"].clone().requires_grad_()
    out = loss(**arguments | {"velocity": velocity})
    (out.loss * weight).sum().backward()
    return [x.detach() for x in out], velocity.grad


def wide(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return Coefficients(value.table.double()) if isinstance(value, Coefficients) else value


def check(loss, arguments):
    """Every field and the gradient: within twice the float32 reference's error of float64, or,
    where that was lucky, within four roundings of the largest value.
    """
    weight = 1.7
    if arguments.get("reduction") == "none":
        weight = per_sample(len(arguments["advantage"]), seed=7)
    dtype = arguments["velocity"].dtype
    got, gradient = differentiated(loss, arguments, weight)
    plain, plain_gradient = differentiated(loss, arguments, weight, backend="reference")
    exact = {name: wide(value) for name, value in arguments.items()}
    true, true_gradient = differentiated(loss, exact, weight, backend="reference")
    got, plain, true = [*got, gradient], [*plain, plain_gradient], [*true, true_gradient]
    for ours, theirs, truth in zip(got, plain, true, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if truth.dtype == torch.bool:
            assert torch.equal(ours, truth)
            continue
        rounding = torch.finfo(dtype if ours is gradient else torch.float32).eps
        error, allowed = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert error <= max(2 * allowed, 4 * rounding * truth.abs().max())
    return got


KEY = key(4)
UNCOND = latent(4, 7, 11, 5, seed=8)
CALLS = take(("in test_triton.py", lambda call: not call.verb.endswith("_loss")))
# So that some samples are clipped, and some are not.
CLIPS = {"policy_loss": 1e-4, "matching_loss": 1e-3}


def with_siblings():
    """Each call with rows of its own and with siblings; interpreted, where a program takes 50 ms,
    in turn one of the two.
    """
    for turn, call in enumerate(CALLS):
        ways = {str(call): call} if call.has("row") else {
            str(call): call, f"{call}, with siblings": call.but(row=GIVEN),
        }  # fmt: skip
        for name, way in list(ways.items())[turn % len(ways) :: 2 if INTERPRETED else 1]:
            yield pytest.param(way, id=name)


def given_to(call, batch, size, dtype=torch.float32):
    p = Problem(call, batch, size, dtype, device=DEVICE)
    clip = CLIPS.get(p.call.verb, 0.5)
    return p.arguments | {"velocity": p["velocity"].detach(), "clip_low": clip, "clip_high": clip}


@pytest.mark.parametrize("call", with_siblings())
def test_close_to_float64(call):
    check(call.function, given_to(call, 3, (7, 11, 5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1,), (4, 64), (257,)])
def test_dtypes_and_sizes(dtype, size):
    """A size of one, of a tile, of a tile and one. States in float32 with a velocity below, too."""
    for name in ("policy_loss, guard, KL", "matching_loss, nft"):
        check(BY_NAME[name].function, given_to(name, 3, size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_noising_rounds_as_the_reference(dtype):
    x0, sigma = latent(3, 300, dtype=dtype), torch.linspace(0, 1, 3, device=DEVICE)
    noise = fk.philox_normal(x0.shape, **key(3), stream="match", backend="triton")
    expected = add_noise(x0, sigma, noise=noise, backend="reference")
    for source in ({"noise": noise}, key(3)):
        got = add_noise(x0, sigma, **source, backend="triton")
        if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts where hardware rounds
            assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(got, expected)


LOSSES = [
    (fk.policy_loss, policy_problem),
    (matching_loss, matching_problem),
    (matching_loss, lambda *a, **k: matching_problem(*a, **k, objective="nft")),
]
laws_of_both = pytest.mark.parametrize("loss, problem", LOSSES, ids=["policy", "awm", "nft"])


def same(got, expected):
    return all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.fixture(params=[1024, 0], ids=["scanned", "indexed"])
def siblings(request, monkeypatch):
    """However programs find the samples of their row: it is chosen by the size of the batch."""
    monkeypatch.setattr(loss_triton, "SCANNED", request.param)
    return request.param


# Each loss in one way, as what finds samples does not know of losses, but for how many slopes.
@pytest.mark.parametrize(
    "siblings, loss, problem",
    [(1024, *LOSSES[0]), (0, *LOSSES[1]), (1024, *LOSSES[2])],
    ids=["scanned-policy", "indexed-awm", "scanned-nft"],
    indirect=["siblings"],
)
def test_siblings_have_the_bits_of_repeated_rows(loss, problem, siblings):
    """Rows without samples, and siblings farther apart than a search for them looks in one go."""
    batch = 35 if siblings else 9
    row = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    row[[0, -2]] = 1
    shared = problem(batch, 60, row=row)
    copies = shared | {"row": None, "velocity": shared["velocity"][row]}
    copies |= {n: shared[n][row] for n in ("x_t", "old_velocity") if n in shared}
    out, gradient = differentiated(loss, shared, 1.0)
    repeated, gradients = differentiated(loss, copies, 1.0)
    assert same(out, repeated)
    expected = torch.zeros_like(gradient)
    for sample, its_row in enumerate(row.tolist()):  # in ascending order
        expected[its_row] += gradients[sample]
    assert torch.equal(gradient, expected) and (gradient[2] == 0).all()


# Interpreted, a program takes 50 ms: siblings, whose gradient does not know of groups, are then
# those of the next test.
@pytest.mark.parametrize("is_shared", [False, True][: 1 if INTERPRETED else 2])
def test_batches_of_many_groups(is_shared):
    """One program makes the statistics of 128 samples; of 132, some of the second group."""
    row = torch.arange(132, device=DEVICE).flip(0) % 2 if is_shared else None
    check(fk.policy_loss, policy_problem(132, 5, row=row))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter counts")
def test_no_program_loops_over_the_batch(monkeypatch):
    """What the busiest program loads, for a batch and one that is a group larger: the samples of
    its row, the statistics of its groups, the losses of all groups, a thousand in one go. With the
    right values, across groups.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    loads = collections.Counter()

    def counting(method):
        def call(*arguments):
            loads[builder.grid_idx] += 1
            return method(*arguments)

        return call

    for name in ("create_load", "create_masked_load"):
        monkeypatch.setattr(builder, name, counting(getattr(builder, name)))
    monkeypatch.setattr(loss_triton, "SCANNED", 0)

    def busiest(batch):
        arguments = policy_problem(batch, 1, row=torch.arange(batch, device=DEVICE) % (batch // 2))
        for name in ("velocity", "old_velocity", "x_t"):
            arguments[name] = arguments[name][:1].expand(batch // 2, 1)
        loads.clear()
        got = fk.policy_loss(**arguments, backend="triton")
        for x, y in zip(got, fk.policy_loss(**arguments, backend="reference"), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        return max(loads.values())

    assert busiest(130) == busiest(258) > 0


@laws_of_both
def test_a_sample_depends_on_itself_alone(loss, problem):
    arguments = problem(5, 600, reduction="none")
    out, gradient = differentiated(loss, arguments, 1.0)
    index = torch.tensor([3, 1], device=DEVICE)
    is_per_sample = lambda x: isinstance(x, torch.Tensor | Coefficients)  # noqa: E731
    part = {n: x[index] if is_per_sample(x) else x for n, x in arguments.items()}
    some, some_gradient = differentiated(loss, part, 1.0)
    assert same(some, [x[index] for x in out]) and torch.equal(some_gradient, gradient[index])


class LooksOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@laws_of_both
def test_as_an_op(loss, problem):
    """What compilers and modes see: its outputs may share no memory. Those of a call do."""
    arguments = problem(3, 300, reduction="none")
    expected = loss(**arguments, backend="triton")
    assert len({x.untyped_storage().data_ptr() for x in expected}) == 1
    with LooksOn():
        got = loss(**arguments, backend="triton")
    assert same(got, expected)
    assert len({x.untyped_storage().data_ptr() for x in got}) == len(got)


@laws_of_both
def test_any_strides(loss, problem):
    arguments = problem(3, 15, 20)
    strided = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2)
        if isinstance(x, torch.Tensor) and x.ndim > 1
        else x
        for n, x in arguments.items()
    }
    strided["velocity"] = torch.stack([arguments["velocity"]] * 2, 1)[:, 1]  # samples apart
    strided["advantage"] = torch.stack([arguments["advantage"]] * 2, 1)[:, 1]
    out, gradient = differentiated(loss, arguments, 1.0)
    again, gradients = differentiated(loss, strided, 1.0)
    assert same(out, again) and torch.equal(gradient, gradients)


@laws_of_both
@pytest.mark.parametrize("batch, size", [(0, 5), (2, 0)])
def test_nothing_to_do(loss, problem, batch, size):
    for row in (None, torch.zeros(batch, dtype=torch.int64, device=DEVICE)):
        for reduction in ("mean", "none"):
            arguments = problem(batch, size, row=row, reduction=reduction)
            out, gradient = differentiated(loss, arguments, 1.0)
            expected, _ = differentiated(loss, arguments, 1.0, backend="reference")
            for x, y in zip(out, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
            assert gradient.shape == arguments["velocity"].shape and not gradient.any()


@laws_of_both
def test_nan_reaches_the_loss(loss, problem):
    for name in ("velocity", "old_velocity", "advantage"):
        arguments = problem(3, 300, reduction="none")
        arguments[name][1] = float("nan")
        (value, *_), _ = differentiated(loss, arguments, 1.0)
        assert value.isnan().tolist() == [False, True, False]


@laws_of_both
def test_a_row_out_of_range_is_nan_and_harms_no_other(loss, problem, siblings, monkeypatch):
    """On a GPU nobody looks at rows; here the check is taken out."""
    monkeypatch.setattr("flowkern.ops._common.arguments._check_range", lambda *_: None)
    row = torch.tensor([0, 7, 1, -1], device=DEVICE)
    arguments = problem(4, 300, row=row, reduction="none")
    out = loss(**arguments, backend="triton")
    assert out.loss.isnan().tolist() == [False, True, False, True]
    assert loss(**arguments | {"reduction": "mean"}, backend="triton").loss.isnan()


def test_on_policy_ratio_is_exactly_one():
    arguments = policy_problem(3, 600, velocity_uncond=UNCOND.flatten(1)[:3, :1].expand(3, 600))
    arguments |= {"guidance_scale": 2.0, "old_velocity": None}
    inputs = {n: arguments[n] for n in ("x_t", "velocity", "c_rows", "velocity_uncond")}
    x_next, log_prob = fk.sde_step(**inputs, guidance_scale=2.0, **key(3), backend="triton")
    arguments["x_next"] = x_next
    gradients = []
    for old in (None, log_prob):
        out, gradient = differentiated(fk.policy_loss, arguments, 1.0, old_log_prob=old)
        assert (out[1] == 0).all() and (out[2] == 1).all()
        gradients.append(gradient)
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("ratio", ["sde", "guard"])
def test_nan_passes_where_nothing_is_learned_on_policy(ratio):
    arguments = policy_problem(3, 300, ratio=ratio) | {"old_velocity": None}
    arguments["advantage"] = torch.zeros(3, device=DEVICE)
    arguments["x_next"][1, 290] = torch.nan
    _, gradient = differentiated(fk.policy_loss, arguments, 1.0)
    assert gradient[1, 290].isnan() and gradient.isnan().sum() == 1 and not gradient[0].any()


@pytest.mark.parametrize("ratio", ["sde", "guard"])
def test_drawn_again_is_as_stored(ratio):
    arguments = policy_problem(4, 600, ratio=ratio)
    arguments["c_rows"].table[2] = step_coefficients(sd3_sigmas(10), "ode", 0.0).table[4].float()
    inputs = arguments["x_t"], arguments["old_velocity"], arguments["c_rows"]
    arguments["x_next"], _ = fk.sde_step(*inputs, **KEY, backend="triton")
    stored = differentiated(fk.policy_loss, arguments, 1.0)
    drawn = differentiated(fk.policy_loss, arguments | KEY | {"x_next": None}, 1.0)
    assert same(stored[0], drawn[0]) and torch.equal(stored[1], drawn[1])
    assert stored[0][1][2] == 0 and not stored[1][2].any()  # no density, no gradient


def nothing(inputs):
    """Of a loss's inputs none: what a backward pass does not look at."""
    return inputs._make([None] * len(inputs._fields))


def test_what_has_no_slope_is_not_read(siblings):
    """Clipped samples do not read x_next, rows of none but such read nothing: NaN stays out."""
    arguments = policy_problem(4, 600, row=ROW, drift=0.5)
    velocity, x_t, x_next, rows = (arguments[n] for n in ("velocity", "x_t", "x_next", "c_rows"))
    slopes = torch.tensor([[1.0, 0], [0, 0], [0, 0], [2, 0]], device=DEVICE)
    grad = torch.ones((), device=DEVICE)
    inputs = nothing(PolicyInputs)._replace(
        velocity=velocity, x_t=x_t, x_next=x_next, c_rows=rows.table, row=ROW,
        guidance_scale=1.0, ratio="sde",
    )  # fmt: skip
    expected = policy.backward(grad, slopes, inputs, None)
    assert expected[1].any() and not expected[0].any()
    x_next[1:3], x_t[0], velocity[0] = float("nan"), float("nan"), float("nan")
    assert torch.equal(policy.backward(grad, slopes, inputs, None), expected)


def test_anchors_without_slope_are_not_read():
    poison = torch.full((2, 600), float("nan"), device=DEVICE)
    velocity, x0, noise = (latent(2, 600, seed=seed) for seed in range(3))
    slopes = torch.tensor([[0, 0, 1.0, 0], [1, 0, 0, 0]], device=DEVICE)
    grad = torch.ones((), device=DEVICE)
    got = []
    for x in (x0, torch.cat([poison[:1], x0[1:]])):
        for ref in (noise, torch.cat([noise[:1], poison[1:]])):
            inputs = nothing(MatchingInputs)._replace(
                velocity=velocity, x0=x, noise=noise, old_velocity=poison, velocity_ref=ref,
                velocity_ema=poison,
            )  # fmt: skip
            got.append(matching.backward(grad, slopes, inputs, None))
    assert torch.equal(got[0][0], velocity[0] - noise[0])
    assert all(torch.equal(x, got[0]) for x in got)


@pytest.mark.parametrize("call", KEEPING, ids=str)
def test_the_residual_kept_forward_is_the_gradient_once(call):
    twice(Problem(call, *((2, 300) if INTERPRETED else (3, 600)), device=DEVICE), "triton")


def test_deterministic_in_whatever_order_programs_run():
    arguments = policy_problem(4, 1500 if INTERPRETED else 70_000)
    first = differentiated(fk.policy_loss, arguments, 1.0)
    for _ in range(1 if INTERPRETED else 20):
        again = differentiated(fk.policy_loss, arguments, 1.0)
        assert same(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@laws_of_both
def test_in_a_cuda_graph(loss, problem):
    """Captured once, run on new values: as the eager call, each time."""
    arguments = problem(3, 70_000)
    velocity = arguments["velocity"].requires_grad_()

    def both_passes():
        out = loss(**arguments, backend="triton")
        return out.loss, torch.autograd.grad(out.loss, velocity)[0]

    both_passes()  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes()
    for seed in range(3):
        with torch.no_grad():
            velocity.copy_(latent(3, 70_000, seed=seed))
        graph.replay()
        assert same(captured, both_passes())


def test_a_guarded_ratio_without_noise_is_one_whatever_the_data():
    arguments = policy_problem(2, 40, ratio="guard")
    arguments["c_rows"] = step_coefficients(sd3_sigmas(4), "ode", 0.0)[0].to(DEVICE)
    arguments["x_next"][0, 3] = float("nan")
    out, gradient = differentiated(fk.policy_loss, arguments, 1.0)
    assert (out[1] == 0).all() and (out[2] == 1).all()
    assert gradient[0, 3].isnan() and gradient.count_nonzero() == 1  # NaN passes where it is
