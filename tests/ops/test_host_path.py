"""The straight way into the CPU kernels: taken where it can be, and only the clock can tell."""

import collections
import contextlib
import functools
import inspect
import re
from pathlib import Path

import pytest
import torch
from calls import GRID as C
from calls import REPLAYS, SOLVERS, Problem, take, twice
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern as fk
from flowkern import torch_private
from flowkern.ops._common import loss_op, native
from flowkern.ops._common.dispatch import choose
from flowkern.ops.matching_loss import api as matching_api
from flowkern.ops.matching_loss.inputs import MatchingInputs
from flowkern.ops.policy_loss import api as policy_api
from flowkern.ops.policy_loss.inputs import PolicyInputs
from flowkern.ops.sde_step import api as step_api
from flowkern.schedules import Coefficients

pytestmark = pytest.mark.skipif(
    fk.backends()["native"] is not None, reason=str(fk.backends()["native"])
)
APIS = (step_api, loss_op, matching_api)  # with a straight way
CALLS = take(
    ("has no straight way", lambda call: call.verb in ("philox_normal", "rescaled_guidance"))
)
SIZE = (5, 130)
ROWS = C[torch.tensor([0, 4, 8])].to("cpu", torch.float32)
G = torch.Generator().manual_seed(0)
X, V, OLD, REF, NOISE, NEXT = torch.randn(6, 3, *SIZE, generator=G).unbind()
A, IDS = torch.tensor([1.0, -0.5, 0.25]), torch.tensor([3, 2**40, -7])
STEPS, ROW = torch.tensor([0, 5, 2**28 - 1]), torch.tensor([2, 0, 2])
SIX = torch.tensor([2, 0, 2, 1, 1, 0])
HALF, BF16 = {"dtype": torch.float16}, {"velocity": torch.bfloat16}


@functools.cache
def problem(call, **dtypes):
    return Problem(call, 3, SIZE, **dtypes)


def of(call, dtypes={}, **change):  # noqa: B006
    """The call of the table with some of its arguments changed."""
    return lambda: problem(call, **dtypes).run(**change)


STRAIGHT = {str(call): of(call) for call in CALLS} | {
    "single edge in float64": of("sde_step", c_rows=C[3]),
    "rows in float64": of("sde_step", c_rows=C[torch.tensor([0, 4, 8])]),
    "steps of samples": of("sde_step", step=STEPS, sample_id=IDS, seed=-3),
    "guided by an integer": of("sde_step, guided, history", guidance_scale=3),
    "halves": of("sde_step", x_t=X.half(), velocity=V.bfloat16(), out_dtype=torch.bfloat16),
    "apart": of("sde_step", x_t=torch.cat([X, V], 1)[:, 5:], velocity=V[:1].expand(3, *SIZE)),
    "ode, single edge": of("ode_step", m_rows=C[3], return_x0=False),
    "ode, half of history": of("ode_step, guided, order 3", history=[NOISE, OLD.half()]),
    "ode, out": of("ode_step", return_x0=False, out=torch.empty(3, *SIZE)),
    "replay of halves": of("sde_log_prob, guided", x_next=NEXT.half()),
    "policy, half velocity": of("policy_loss, recorded", BF16),
    "policy, KL, siblings": of("policy_loss, siblings", velocity_ref=REF, kl_coef=0.1),
    "policy, edge in float64": of("policy_loss, weights, one edge", c_rows=C[3]),
    "awm, ends": of("matching_loss", sigma=torch.tensor([0.1, 0.5, 1.0])),
    "awm, integers": of("matching_loss, siblings, anchors", ema_coef=1),
    "awm, one sigma": of("matching_loss, t", sigma=0.3),
    "nft, halves": of("matching_loss, nft", HALF),
    "nft, steps": of("matching_loss, nft, on policy, KL", step=STEPS, old_velocity=OLD),
    "noised halves": of("add_noise, noise given", x0=X.half(), sigma=torch.tensor([0, 0.5, 1])),
}
ROUND_ABOUT = {
    "permuted": of("sde_step", x_t=X.transpose(1, 2).contiguous().transpose(1, 2)),
    "sample_id of int32": of("sde_step", sample_id=IDS.int()),
    "sample_id in a list": of("sde_step", sample_id=[1, 2, 3]),
    "history in a range of its own": of("ode_step", history=collections.deque([X])),
    "float64": of("sde_step", x_t=X.double()),
    "nothing": of("ode_step", x_t=X[:0], velocity=V[:0], m_rows=C[3]),
    "advantage of float64": of("policy_loss", advantage=A.double()),
    "row of int32": of("policy_loss, siblings", row=SIX.int()),
    "sigma, one tensor for all": of("matching_loss", sigma=torch.tensor(0.5)),
    "strided noise": of("matching_loss, nft", noise=torch.stack([NOISE, NOISE], -1)[..., 0]),
    "noise and a step of 0": of("matching_loss, nft", step=0),
}
WRONG = {
    "no noise": of("sde_step", seed=None, sample_id=None, step=None),
    "seed of 65 bits": of("sde_step", seed=2**64),
    "no number": of("sde_step", guidance_scale=float("nan"), velocity_uncond=OLD),
    "scale beside 1, in float64 only": of("sde_step", guidance_scale=1 + 1e-12),
    "scale past float64": of("sde_log_prob, guided", guidance_scale=10**400),
    "step past 28 bits": of("sde_step", step=2**28),
    "a step past 28 bits": of("sde_step", step=STEPS + 1),
    "a table": of("sde_step", c_rows=ROWS.table),
    "short history": of("ode_step", m_rows=SOLVERS["m_rows"]),
    "history": of("sde_log_prob", c_rows=SOLVERS["c_rows"]),
    "rows": of("sde_step", c_rows=C),
    "shape": of("sde_step", velocity=V[:, :4]),
    "sample_id": of("sde_step", sample_id=IDS[:2]),
    "out overlaps": of("sde_step", x_t=(lap := torch.randn(4, *SIZE))[:3], out=lap[1:]),
    "out, strided": of("sde_step", out=torch.empty(3, 130, 5).transpose(1, 2)),
    "out with gradient": of("sde_step", out=torch.empty(3, *SIZE, requires_grad=True)),
    "out of another dtype": of("sde_step", out=torch.empty(3, *SIZE), out_dtype=torch.float16),
    "meta": of("sde_step", velocity=V.to("meta")),
    "row": of("policy_loss, siblings", row=SIX + 1),
    "both old": of("policy_loss", old_log_prob=A),
    "old for guard": of("policy_loss, recorded", ratio="guard"),
    "no reference": of("policy_loss", kl_coef=0.1),
    "x_next and noise": of("policy_loss", noise=NOISE),
    "half states": of("policy_loss, drawn again", x_t=X.half()),
    "ratio": of("policy_loss", ratio="sdf"),
    "clip_low": of("policy_loss", clip_low=1.0),
    "advantage": of("policy_loss", advantage=A[:2]),
    "sigma": of("matching_loss", sigma=torch.tensor([0.1, 0.2, 1.5])),
    "sigma to noise with": of("add_noise", sigma=torch.tensor([0.1, -0.2, 0.5])),
    "sigma, NaN": of("matching_loss", sigma=float("nan")),
    "objective": of("matching_loss", objective=1),
    "no anchor": of("matching_loss", ema_coef=1.0),
    "noise and a key": of("matching_loss", noise=NOISE),
    "noise and a step": of("matching_loss, noise given", step=1),
}


@contextlib.contextmanager
def around(monkeypatch):
    """Every call takes the way that checks."""
    with monkeypatch.context() as patch:
        for api in APIS:
            patch.setattr(api, "direct", lambda backend, like: None)
        yield


@pytest.fixture
def attributes_only():
    """As with a torch from before DLPack's C exchange API."""
    native.connect(native.cpu(), None)
    yield
    native.connect(native.cpu(), torch_private.exchange)


class Watched:
    """The kernels, with a count of the calls that each way served."""

    def __init__(self):
        self.taken, self.refused = 0, 0

    def __getattr__(self, name):
        def call(*arguments):
            result = getattr(native.cpu(), name)(*arguments)
            self.taken += result is not None
            self.refused += result is None
            return result

        return call


def same(a, b):
    a, b = ((x,) if isinstance(x, torch.Tensor) else x for x in (a, b))
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()
        and x.requires_grad == y.requires_grad and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )  # fmt: skip


def compare(call, monkeypatch) -> Watched:
    """The call gives the same either way; returns what happened on the straight one."""
    kernels = Watched()
    with monkeypatch.context() as patch:
        for api in APIS:
            direct = api.direct
            patch.setattr(
                api, "direct", lambda b, x, direct=direct: kernels if direct(b, x) else None
            )
        straight = call()
    with around(monkeypatch):
        assert same(straight, call())
    return kernels


@pytest.mark.parametrize("name", STRAIGHT)
def test_the_straight_way_is_taken_and_gives_the_same(name, monkeypatch):
    kernels = compare(STRAIGHT[name], monkeypatch)
    assert (kernels.taken, kernels.refused) == (1, 0)


@pytest.mark.parametrize("name", ROUND_ABOUT)
def test_what_needs_a_closer_look_gives_the_same(name, monkeypatch):
    assert compare(ROUND_ABOUT[name], monkeypatch).taken == (name == "noise and a step of 0")


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_the_way_that_checks(name, monkeypatch):
    with pytest.raises(Exception) as straight:
        WRONG[name]()
    with around(monkeypatch), pytest.raises(Exception) as expected:
        WRONG[name]()
    assert straight.type is expected.type and str(straight.value) == str(expected.value)
    assert straight.type is not RuntimeError or name == "out with gradient"


@pytest.mark.parametrize("name", [*STRAIGHT, *ROUND_ABOUT])
def test_without_the_exchange_api(name, monkeypatch, attributes_only):
    call = (STRAIGHT | ROUND_ABOUT)[name]
    kernels = compare(call, monkeypatch)
    assert kernels.taken == (name in STRAIGHT or name == "noise and a step of 0")
    got = call()
    native.connect(native.cpu(), torch_private.exchange)
    assert same(got, call())


@pytest.mark.parametrize("name", ["num_modes", "is_in_func", "forward_level", "is_batched"])
def test_without_a_private_name_of_torch(name, monkeypatch):
    """As with a torch that has it no more: its public way gives the same, and the same refusals."""
    calls = [of(call) for call in CALLS if call.is_first]
    expected = [call() for call in calls]
    monkeypatch.setattr(torch_private, name, torch_private.PUBLIC[name])
    for call, result in zip(calls, expected, strict=True):
        assert same(call(), result)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(fk.BackendError, match="forward"):
        problem("sde_step").run("native")
    with pytest.raises(fk.BackendError, match="its kernels have no forward mode"):
        torch.func.grad(lambda v: fk.ode_step(X, v, C[3], backend="native").sum())(V)
    if name == "num_modes":
        return  # the dispatcher serves, and refuses in its own words
    v = V.clone().requires_grad_()
    log_prob = fk.sde_log_prob(X, v, NEXT, ROWS)
    with pytest.raises(fk.BackendError, match="grad: the kernels"):
        torch.autograd.grad(log_prob, v, torch.ones(2, 3), is_grads_batched=True)


def test_public_ways_that_need_no_call(monkeypatch):
    """Of what the kernels ask on a device, of a version, and of what compilers look for."""
    stream = type("Stream", (), {"cuda_stream": 7})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    assert torch_private.PUBLIC["raw_stream"](0) == 7
    for lerp_all in (torch_private.PUBLIC["lerp_all"], torch_private.lerp_all):
        mean = [torch.zeros(2), torch.ones(3)]
        lerp_all(mean, [torch.ones(2), torch.zeros(3)], 0.25)
        assert mean[0].tolist() == [0.25] * 2 and mean[1].tolist() == [0.75] * 3
    for assert_async in (torch_private.PUBLIC["assert_async"], torch_private.assert_async):
        assert_async(torch.tensor(True), "a reason")
        with pytest.raises(RuntimeError, match="a reason"):
            assert_async(torch.tensor(False), "a reason")
    monkeypatch.setattr(
        torch_private, "increment_version", torch_private.PUBLIC["increment_version"]
    )
    test_out_is_marked_as_written()
    ours, public = lambda: None, lambda: None
    torch_private.as_constant(ours)
    torch_private.PUBLIC["as_constant"](public)
    assert vars(ours) == vars(public) != {}


def test_private_names_of_torch_are_in_one_file():
    package = Path(torch_private.__file__).parent
    private = re.compile(r"torch\._(?!_version__)|forward_ad\._|_dynamo_marked|__dlpack_c")
    users = {path.name for path in package.rglob("*.py") if private.search(path.read_text())}
    assert users == {"torch_private.py"}


@pytest.mark.parametrize(
    "verb, inputs", [(fk.policy_loss, PolicyInputs), (fk.matching_loss, MatchingInputs)]
)
def test_inputs_are_the_arguments_in_their_order(verb, inputs):
    """But for what a verb does before its kernels are asked."""
    own = {"uncond_gradient", "backend"}
    assert [p for p in inspect.signature(verb).parameters if p not in own] == [*inputs._fields]


def test_without_the_module(monkeypatch, request):
    expected = {name: call() for name, call in STRAIGHT.items()}
    monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    choose.cache_clear()
    request.addfinalizer(choose.cache_clear)
    for name, call in STRAIGHT.items():
        for x, y in zip(call(), expected[name], strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-3)


# ---- who must see more than the kernel ----


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_dispatch_mode_sees_the_op(call):
    op = {"sde_step": "sde_draw", "ode_step": "sde_draw"}.get(call.verb, call.verb)
    op += "_and_mean" * (call.verb == "sde_log_prob" and call.has("return_mean"))
    with Seen() as seen:
        got = of(call)()
    assert f"flowkern.{op}.default" in seen.names and same(got, of(call)())


def test_a_subclass_is_not_read_past_its_back():
    class Plain(torch.Tensor):
        pass

    kernels = native.cpu()
    given = (X.as_subclass(Plain), V, ROWS, None, 1.0, (), NOISE, None, None, None, None, None)
    assert kernels.sde_draw(*given, True, False) is None
    got, log_prob = fk.sde_step(X.as_subclass(Plain), V, ROWS, NOISE)
    assert same((got, log_prob), fk.sde_step(X, V, ROWS, NOISE))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_the_straight_way_is_shut_under_torch_func(transform):
    """A wrapped tensor passes for a plain one; tests/ops/test_transforms.py has the rest."""
    ways = []
    v = V if transform is torch.func.vmap else V[0]
    transform(lambda v: ways.append(step_api.direct(None, V)) or v.sum())(v)
    assert ways == [None] and step_api.direct(None, V) is native.cpu()


def test_out_is_marked_as_written():
    out = torch.empty_like(X)
    for call in (of("sde_step", out=out), of("ode_step", out=out)):
        version = out._version
        call()
        assert out._version == version + 1


def test_a_table_edited_between_the_passes_is_noticed():
    rows = Coefficients(ROWS.table.clone())
    v = V.clone().requires_grad_()
    log_prob = fk.sde_log_prob(X, v, NEXT, rows)
    rows.table.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()


@pytest.mark.parametrize("x_t", [X, X.transpose(1, 2).contiguous().transpose(1, 2)])
def test_the_op_writes_to_any_layout(x_t):
    """Compilers choose layouts; a kernel that copies what it cannot read must not lose a result."""
    apart = [torch.empty(3, 130, 5).transpose(1, 2) for _ in range(2)]
    source = (NOISE, 0, None, None, 0)
    torch.ops.flowkern.sde_draw(
        x_t, V, ROWS.table, None, 1.0, [], *source, apart[0], None, apart[1], None, None, "native"
    )
    assert torch.equal(apart[0], fk.sde_step(X, V, ROWS, NOISE)[0])
    assert torch.equal(apart[1], fk.ode_step(X, V, ROWS, return_x0=True)[1])


# ---- the residual that becomes the gradient ----

LOSSES = take(
    ("is no loss", lambda c: not c.verb.endswith("_loss")),
    ("takes the longer way", lambda c: c.has("row")),
    (
        "keeps nothing: on policy no latent is read forward",
        lambda c: c.verb == "policy_loss" and not (c.has("old_velocity") or c.has("old_log_prob")),
    ),
    (
        "keeps nothing: of two residuals",
        lambda c: c.given.get("objective") == "nft" and c.has("old_velocity"),
    ),
)
CLIPPED = {"clip_low": 0, "clip_high": 0, "x_next": NEXT / torch.tensor([1.0, 1, 0])[:, None, None]}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", [*map(str, LOSSES), "clipped"])
def test_the_residual_kept_forward_is_the_gradient_once(name, reduction, monkeypatch):
    """One pass may take the forward pass's memory; every other has the bits of the longer way,
    which a `row` takes, in memory of its own.
    """
    p = problem("policy_loss" if name == "clipped" else name)
    given = p.arguments | {"reduction": reduction} | (CLIPPED if name == "clipped" else {})
    v, function = p["velocity"], p.call.function
    api = policy_api if function is fk.policy_loss else matching_api
    calls = []

    def backward(grad, slopes, inputs, residual=None):
        calls.extend([] if residual is None else [residual])
        return native_backward(grad, slopes, inputs, residual)

    native_backward = api.LOSS.backwards["native"]
    monkeypatch.setitem(api.LOSS.backwards, "native", backward)

    def loss_of(**more):
        return function(**given | more).loss

    kept, longer = loss_of(), loss_of(row=torch.arange(3))
    assert torch.equal(kept, longer) or not kept.isfinite().all()
    weights = [torch.tensor([1.0, -0.3, 7.0]), torch.tensor([0.0, 1 / 3, 1.0])]
    for count, weight in enumerate(w if reduction == "none" else w[1] for w in weights):
        ours, theirs = (
            torch.autograd.grad(x, v, weight, retain_graph=True)[0] for x in (kept, longer)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert len(calls) == 1 and (calls[0].data_ptr() == ours.data_ptr()) == (count == 0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss_of(), v, weight, create_graph=True)
    with torch.no_grad():
        assert function(**given).loss.grad_fn is None


@pytest.mark.parametrize("call", REPLAYS, ids=str)
def test_the_residual_of_a_replay_is_the_gradient_once(call):
    twice(Problem(call), None)


@pytest.mark.parametrize("call", ["policy_loss", "matching_loss, noise given"])
def test_a_changed_input_is_noticed_where_none_is_read_again(call):
    p = Problem(call)
    loss = p.run(learn=False)[0]
    p[p.latents[1]].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- what a kernel says itself ----


def test_a_kernel_called_past_the_verbs_checks_what_it_reads():
    kernels, slopes, ones = native.cpu(), torch.zeros(3, 2), torch.ones(3)
    inputs = PolicyInputs._make([None] * 21)._replace(
        velocity=V, x_t=X, x_next=NEXT, c_rows=ROWS.table, guidance_scale=1.0, ratio="sde"
    )
    call = (ones, slopes, *inputs._replace(row=ROW + 1), None)
    assert kernels.policy_backward(*call, False) is None
    with pytest.raises(IndexError, match=r"row: expected values in \[0, 3\), got 3"):
        kernels.policy_backward(*call, True)
    call = (ones, slopes[:2], *inputs, None)
    with pytest.raises(ValueError, match="slopes: not as the kernels read it"):
        kernels.policy_backward(*call, True)
    with pytest.raises(TypeError, match="expected 24 arguments, got 2"):
        kernels.policy_backward(ones, slopes)
    latent_first = (X, V, NEXT, ROWS.table, None, 1.0, False)
    assert kernels.sde_replay(*latent_first) is None  # a table is for those who have checked it
    assert kernels.sde_replay(*latent_first, False) is not None
