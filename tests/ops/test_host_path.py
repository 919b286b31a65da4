"""The straight way into the CPU kernels: taken where it can be, and only the clock can tell."""

import contextlib
import inspect
import re
from pathlib import Path

import pytest
import torch
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
from flowkern.schedules import Coefficients, multistep_coefficients, sd3_sigmas, step_coefficients

pytestmark = pytest.mark.skipif(
    fk.backends()["native"] is not None, reason=str(fk.backends()["native"])
)
APIS = (step_api, loss_op, matching_api)  # with a straight way
C = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)
ROWS = C[torch.tensor([0, 4, 8])].to("cpu", torch.float32)
MULTISTEP = multistep_coefficients((0.9, 0.8, 0.7), 2)
G = torch.Generator().manual_seed(0)
X, V, OLD, REF, NOISE, NEXT = torch.randn(6, 3, 5, 130, generator=G).unbind()
A = torch.tensor([1.0, -0.5, 0.25])
IDS, KEY = (
    torch.tensor([3, 2**40, -7]),
    {"seed": 2**64 - 5, "sample_id": torch.arange(3), "step": 9},
)
STEPS, ROW = torch.tensor([0, 5, 2**28 - 1]), torch.tensor([2, 0, 2])
NOISY = {"noise": NOISE}


def step(**change):
    return lambda: fk.sde_step(**{"x_t": X, "velocity": V, "c_rows": ROWS} | KEY | change)


def ode(**change):
    return lambda: fk.ode_step(**{"x_t": X, "velocity": V, "m_rows": C[3]} | change)


def replay(**change):
    def call():
        v = V.clone().requires_grad_()
        log_prob = fk.sde_log_prob(
            **{"x_t": X, "velocity": v, "x_next": NEXT, "c_rows": ROWS} | change
        )
        weight = torch.tensor([1.0, 2.0, 3.0])
        return log_prob, *torch.autograd.grad((log_prob * weight).sum(), v)

    return call


def loss(function, arguments, change):
    def call():
        v = (OLD + 0.01 * V).to(change.get("dtype", torch.float32)).requires_grad_()
        given = {k: x for k, x in change.items() if k != "dtype"}
        out = function(v, **arguments | given)
        return *out, *torch.autograd.grad(out.loss.sum(), v)

    return call


def policy(**change):
    arguments = {"x_t": X, "x_next": NEXT, "c_rows": ROWS, "advantage": A, "old_velocity": OLD}
    return loss(fk.policy_loss, arguments | {"clip_low": 0.9, "clip_high": 9.0}, change)


def matching(**change):
    arguments = {"x0": X, "sigma": torch.tensor([0.1, 0.5, 1.0]), "advantage": A}
    return loss(
        fk.matching_loss, arguments | {"old_velocity": OLD} | change.pop("source", NOISY), change
    )


def noising(**change):
    arguments = {"x0": X, "sigma": torch.tensor([0.0, 0.5, 1.0])} | change.pop("source", NOISY)
    return lambda: fk.add_noise(**arguments | change)


HALF = {"x_t": X.half(), "velocity": V.bfloat16()}
STRAIGHT = {
    "draw": step(),
    "draw, single edge in float64": step(c_rows=C[3]),
    "draw, rows in float64": step(c_rows=C[torch.tensor([0, 4, 8])]),
    "draw, steps of samples": step(step=STEPS, sample_id=IDS, seed=-3),
    "draw, guided, noise given": lambda: fk.sde_step(
        X, V, ROWS, NOISE, velocity_uncond=OLD, guidance_scale=3
    ),
    "draw, halves": step(**HALF, out_dtype=torch.bfloat16),
    "draw, rows apart": step(x_t=torch.cat([X, V], 1)[:, 5:], velocity=V[:1].expand(3, 5, 130)),
    "ode": ode(),
    "ode, history, x0": ode(m_rows=MULTISTEP, history=[NOISE, OLD.half()], return_x0=True),
    "ode, out": ode(out=torch.empty(3, 5, 130)),
    "replay": replay(),
    "replay, guided": replay(velocity_uncond=OLD, guidance_scale=2.5, x_next=NEXT.half()),
    "policy": policy(),
    "policy, on policy": policy(old_velocity=None),
    "policy, KL, siblings": policy(row=ROW, velocity_ref=REF, kl_coef=0.1, reduction="none"),
    "policy, weights": policy(step_weight=A + 2, kl_coef=A + 3, velocity_ref=REF, c_rows=C[3]),
    "policy, guard, drawn again": policy(ratio="guard", x_next=None, **KEY),
    "policy, noise given": policy(x_next=None, noise=NOISE, reduction="sum"),
    "policy, recorded": policy(old_velocity=None, old_log_prob=A, dtype=torch.bfloat16),
    "awm": matching(velocity_ref=REF, velocity_ema=V, ref_coef=0.1, ema_coef=1, row=ROW),
    "awm, drawn again": matching(source=KEY, sigma=0.3, weighting="t", reduction="none"),
    "nft": matching(objective="nft", dtype=torch.float16),
    "noised": noising(x0=X.half()),
    "noised, drawn": noising(source=KEY),
    "nft, drawn again": matching(objective="nft", source=KEY | {"step": STEPS}),
}
ROUND_ABOUT = {
    "permuted": step(x_t=X.transpose(1, 2).contiguous().transpose(1, 2)),
    "sample_id of int32": step(sample_id=IDS.int()),
    "sample_id in a list": step(sample_id=[1, 2, 3]),
    "history in a range of its own": ode(history=__import__("collections").deque([X])),
    "float64": step(x_t=X.double()),
    "nothing": ode(x_t=X[:0], velocity=V[:0]),
    "advantage of float64": policy(advantage=A.double()),
    "row of int32": policy(row=ROW.int()),
    "sigma, one tensor for all": matching(sigma=torch.tensor(0.5)),
    "strided noise": matching(source={"noise": torch.stack([NOISE, NOISE], -1)[..., 0]}),
    "noise and a step of 0": matching(source={"noise": NOISE, "step": 0}, objective="nft"),
}
WRONG = {
    "no noise": step(seed=None, sample_id=None, step=None),
    "seed of 65 bits": step(seed=2**64),
    "no number": step(guidance_scale=float("nan"), velocity_uncond=OLD),
    "scale beside 1, in float64 only": step(guidance_scale=1 + 1e-12),
    "scale past float64": replay(guidance_scale=10**400, velocity_uncond=OLD),
    "step past 28 bits": step(step=2**28),
    "a step past 28 bits": step(step=STEPS + 1),
    "a table": step(c_rows=ROWS.table),
    "short history": ode(m_rows=MULTISTEP),
    "history": replay(c_rows=MULTISTEP),
    "rows": step(c_rows=C),
    "shape": step(velocity=V[:, :4]),
    "sample_id": step(sample_id=IDS[:2]),
    "out overlaps": step(x_t=(lap := torch.randn(4, 5, 130))[:3], out=lap[1:]),
    "out, strided": step(out=torch.empty(3, 130, 5).transpose(1, 2)),
    "out with gradient": step(out=torch.empty(3, 5, 130, requires_grad=True)),
    "out of another dtype": step(out=torch.empty(3, 5, 130), out_dtype=torch.float16),
    "meta": step(velocity=V.to("meta")),
    "row": policy(row=ROW + 1),
    "both old": policy(old_log_prob=A),
    "old for guard": policy(old_velocity=None, old_log_prob=A, ratio="guard"),
    "no reference": policy(kl_coef=0.1),
    "x_next and noise": policy(noise=NOISE),
    "half states": policy(x_t=X.half(), x_next=None, **KEY),
    "ratio": policy(ratio="sdf"),
    "clip_low": policy(clip_low=1.0),
    "advantage": policy(advantage=A[:2]),
    "sigma": matching(sigma=torch.tensor([0.1, 0.2, 1.5])),
    "sigma to noise with": noising(sigma=torch.tensor([0.1, -0.2, 0.5])),
    "sigma, NaN": matching(sigma=float("nan")),
    "objective": matching(objective=1),
    "no anchor": matching(ema_coef=1.0),
    "noise and a key": matching(source=NOISY | KEY),
    "noise and a step": matching(source=NOISY | {"step": 1}),
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
    calls = [call for key, call in STRAIGHT.items() if key in ("draw", "ode", "policy", "awm")]
    expected = [call() for call in calls]
    monkeypatch.setattr(torch_private, name, torch_private.PUBLIC[name])
    for call, result in zip(calls, expected, strict=True):
        assert same(call(), result)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(fk.BackendError, match="forward"):
        step(backend="native")()
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
    private = re.compile(r"torch\._|forward_ad\._|_dynamo_marked|__dlpack_c")
    users = {path.name for path in package.rglob("*.py") if private.search(path.read_text())}
    assert users == {"torch_private.py"}


@pytest.mark.parametrize(
    "verb, inputs", [(fk.policy_loss, PolicyInputs), (fk.matching_loss, MatchingInputs)]
)
def test_inputs_are_the_arguments_in_their_order(verb, inputs):
    assert [*inspect.signature(verb).parameters] == [*inputs._fields, "backend"]


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


def test_a_dispatch_mode_sees_the_op():
    for call, op in (
        (step(), "sde_draw"),
        (policy(), "policy_loss"),
        (matching(), "matching_loss"),
    ):
        with Seen() as seen:
            got = call()
        assert f"flowkern.{op}.default" in seen.names and same(got, call())


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
    for call in (step(out=out), ode(out=out)):
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
        x_t, V, ROWS.table, None, 1.0, [], *source, apart[0], None, apart[1], "native"
    )
    assert torch.equal(apart[0], fk.sde_step(X, V, ROWS, NOISE)[0])
    assert torch.equal(apart[1], fk.ode_step(X, V, ROWS, return_x0=True)[1])


# ---- the residual that becomes the gradient ----

DRAWN_AGAIN = {"x_next": None} | KEY
CLIPPED = {"clip_low": 0, "clip_high": 0, "x_next": NEXT / torch.tensor([1.0, 1, 0])[:, None, None]}
ANCHORS = {"velocity_ref": REF, "velocity_ema": NEXT, "ref_coef": 0.3, "ema_coef": 0.7}
KEPT = {
    "exact": (fk.policy_loss, {}),
    "guard": (fk.policy_loss, {"ratio": "guard"}),
    "recorded": (fk.policy_loss, {"old_velocity": None, "old_log_prob": A}),
    "clipped": (fk.policy_loss, CLIPPED),
    "KL": (fk.policy_loss, {"velocity_ref": REF, "kl_coef": 0.3}),
    "KL, guided": (
        fk.policy_loss,
        {"velocity_ref": REF, "kl_coef": A.abs()} | {"velocity_uncond": X, "guidance_scale": 3.0},
    ),
    "drawn again": (fk.policy_loss, DRAWN_AGAIN),
    "awm": (fk.matching_loss, {}),
    "awm, on policy": (fk.matching_loss, {"old_velocity": None}),
    "awm, anchors": (fk.matching_loss, ANCHORS),
    "awm, anchors, drawn": (fk.matching_loss, ANCHORS | {"noise": None} | KEY),
    "nft": (fk.matching_loss, {"old_velocity": None, "objective": "nft"} | ANCHORS),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", KEPT)
def test_the_residual_kept_forward_is_the_gradient_once(name, reduction, monkeypatch):
    """One pass may take the forward pass's memory; every other has the bits of the longer way,
    which a `row` takes, in memory of its own.
    """
    function, change = KEPT[name]
    of_policy = {"x_t": X, "x_next": NEXT, "c_rows": ROWS, "old_velocity": OLD}
    of_matching = {"x0": X, "sigma": 0.5, "old_velocity": OLD} | NOISY
    given = (of_policy if function is fk.policy_loss else of_matching) | {"clip_high": 9.0} | change
    v = (OLD + 0.01 * V).requires_grad_()
    api = policy_api if function is fk.policy_loss else matching_api
    calls = []

    def backward(grad, slopes, inputs, residual=None):
        calls.extend([] if residual is None else [residual])
        return native_backward(grad, slopes, inputs, residual)

    native_backward = api.LOSS.backwards["native"]
    monkeypatch.setitem(api.LOSS.backwards, "native", backward)

    def loss_of(**more):
        return function(v, advantage=A, reduction=reduction, **given | more).loss

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
        assert function(v, advantage=A, reduction=reduction, **given).loss.grad_fn is None


@pytest.mark.parametrize("name", ["exact", "awm"])
def test_a_changed_input_is_noticed_where_none_is_read_again(name):
    function, x = KEPT[name][0], X.clone()
    given = {
        "exact": {"x_t": x, "x_next": NEXT, "c_rows": ROWS},
        "awm": {"x0": x, "sigma": 0.5} | NOISY,
    }
    loss = function(V.clone().requires_grad_(), advantage=A, old_velocity=OLD, **given[name]).loss
    x.add_(1)
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
    latent_first = (X, V, NEXT, ROWS.table, None, 1.0)
    assert kernels.sde_replay(*latent_first) is None  # a table is for those who have checked it
    assert kernels.sde_replay(*latent_first, False) is not None
