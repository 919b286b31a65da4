"""Forward mode and torch.func: served by the reference, refused in words by the kernels, which
would drop a tangent and cannot see into a wrapped tensor.
"""

import calls
import pytest
import torch
from calls import Problem, take
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern as fk

CALLS = take(("has no latent to differentiate in: below", lambda c: c.verb == "philox_normal"))
MOVING = take(
    ("has no latent to differentiate in", lambda c: c.verb == "philox_normal"),
    (
        "parts of its value are fixed, which its differences move",
        lambda c: c.verb.endswith("_loss") and not (c.has("old_velocity") or c.has("old_log_prob")),
    ),
    ("its differences see steps where it rounds", lambda c: c.has("round_dtype")),
    ("the weights of nft are fixed, too", lambda c: c.given.get("objective") == "nft"),
)
LOSSES = [call for call in CALLS if call.learned]
T = torch.randn(2, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
every_call = pytest.mark.parametrize("call", CALLS, ids=str)
every_loss = pytest.mark.parametrize("call", LOSSES, ids=str)


def problem(call):
    """(arguments, the latent that is differentiated in) in float64; nothing requires a gradient."""
    p = Problem(call, 2, 33).double()
    p.at = "velocity" if "velocity" in p.arguments else "x0"
    return p, p[p.at].requires_grad_(False).clone()


def reference(p):
    """The op as a function of its latent, in float64."""
    return lambda v: p.run("reference", learn=False, **{p.at: v})[0]


def kernel(p, backend="native"):
    """The same on the kernels, in float32."""
    p = p.changed(lambda x: x.float() if x.is_floating_point() else x)
    return lambda v: p.run(backend, learn=False, **{p.at: v})[0]


@pytest.fixture
def native():
    if fk.backends()["native"] is not None:
        pytest.skip(fk.backends()["native"])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", MOVING, ids=str)
def test_forward_mode_of_the_reference(call, requires_grad):
    p, v = problem(call)
    op, step = reference(p), 1e-5
    difference = (op(v + step * T) - op(v - step * T)) / (2 * step)
    assert difference.abs().max() > 1e-3
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v.clone().requires_grad_(requires_grad), T)
        tangent = forward_ad.unpack_dual(op(dual)).tangent
    torch.testing.assert_close(tangent.detach(), difference, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(jvp(op, (v,), (T,))[1], difference, rtol=1e-7, atol=1e-9)


@every_loss
def test_torch_func_on_the_reference(call):
    p, v = problem(call)
    op, velocity = reference(p), v.clone().requires_grad_()
    expected = torch.autograd.grad(op(velocity).sum(), velocity)[0]
    torch.testing.assert_close(grad(lambda v: op(v).sum())(v), expected)
    torch.testing.assert_close(jvp(lambda v: op(v).sum(), (v,), (T,))[1], (expected * T).sum())
    both = torch.stack([v, v + T])
    torch.testing.assert_close(vmap(op)(both), torch.stack([op(v) for v in both]))
    if call not in MOVING:
        return
    second = torch.func.hessian(lambda v: op(v).sum())(v).reshape(v.numel(), -1)
    step = 1e-5  # a Hessian is forward mode over reverse mode
    slope = lambda v: grad(lambda v: op(v).sum())(v)  # noqa: E731
    difference = (slope(v + step * T) - slope(v - step * T)) / (2 * step)
    torch.testing.assert_close((second @ T.flatten()).reshape(T.shape), difference)


def test_second_derivative_of_the_reference():
    """By hand: log_prob is a parabola in the velocity, of curvature -2 k b^2 / D."""
    p, velocity = problem("sde_log_prob")
    c = p["c_rows"]
    log_prob = reference(p)(velocity.requires_grad_()).sum()
    first = torch.autograd.grad(log_prob, velocity, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), velocity)[0]
    expected = (-2 * c.k * c.b**2 / velocity.shape[1])[:, None].expand_as(second)
    torch.testing.assert_close(second, expected)


REFUSAL = "its kernels have no forward mode and cannot see into what torch.func wraps"


@pytest.mark.parametrize("requires_grad", [False, True])
@every_call
def test_kernels_refuse_forward_mode(call, requires_grad, native):
    p, v = problem(call)
    op, velocity = kernel(p), v.float().requires_grad_(requires_grad)
    plain = op(velocity)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(velocity, T.float())
        with pytest.raises(fk.BackendError, match=f"^backend='native' cannot serve .*: {REFUSAL}"):
            op(dual)
    assert torch.equal(op(velocity), plain)


@every_call
def test_without_a_name_the_reference_serves(call):
    """In float32, where kernels would be the best."""
    p, v = problem(call)
    ways, v, t = (kernel(p, None), kernel(p, "reference")), v.float(), T.float()
    for got, expected in zip(*(jvp(op, (v,), (t,)) for op in ways), strict=True):
        assert torch.equal(got, expected)
    with forward_ad.dual_level():
        got, expected = (
            forward_ad.unpack_dual(op(forward_ad.make_dual(v, t))).tangent for op in ways
        )
        assert expected.abs().max() > 1e-3 and torch.equal(got, expected)
    if call.learned:
        assert torch.equal(*(grad(lambda v, op=op: op(v).sum())(v) for op in ways))
        assert torch.equal(*(vmap(op)(torch.stack([v, t])) for op in ways))


@every_call
def test_a_mode_that_looks_on_costs_no_tangent(call):
    class Onlooker(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    p, v = problem(call)
    expected = jvp(reference(p), (v,), (T,))[1]
    with Onlooker(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(reference(p)(forward_ad.make_dual(v, T))).tangent
    assert torch.equal(tangent, expected)


@every_call
def test_kernels_refuse_torch_func(call, native):
    p, v = problem(call)
    op, v, t = kernel(p), v.float(), T.float()
    scale, batch = torch.tensor(2.0), torch.stack([v, t])
    for transformed in (
        lambda: jvp(op, (v,), (t,)),
        lambda: vjp(op, v),
        lambda: grad(lambda v: op(v).sum())(v),
        lambda: jacrev(op)(v),
        lambda: vmap(op)(batch),
        lambda: functionalize(op)(v),
        lambda: grad(lambda s: (s * op(v)).sum())(scale),  # the op's own outputs are wrapped, too
    ):
        with pytest.raises(fk.BackendError, match=f"^backend='native' cannot serve .*: {REFUSAL}"):
            transformed()


def test_noise_under_torch_func(native):
    p = Problem("philox_normal", 2, 8)
    draw = lambda s, backend=None: s * p.run(backend)[0]  # noqa: E731
    with pytest.raises(fk.BackendError, match=REFUSAL):
        jvp(lambda s: draw(s, "native"), (torch.ones(()),), (torch.ones(()),))
    served = jvp(draw, (torch.ones(()),), (torch.ones(()),))
    assert torch.equal(served[1], draw(1.0))


@pytest.mark.parametrize(
    "call", take(calls.ONE_OF_EACH, ("above", lambda c: c.verb == "philox_normal")), ids=str
)
def test_compiled_kernels_refuse_forward_mode(call, native):
    torch.compiler.reset()
    p, v = problem(call)
    velocity = v.float()
    compiled = torch.compile(kernel(p), fullgraph=True, backend="aot_eager")
    plain = compiled(velocity)
    with forward_ad.dual_level(), pytest.raises(Exception, match=REFUSAL):
        compiled(forward_ad.make_dual(velocity, T.float()))
    assert torch.equal(compiled(velocity), plain)


@every_loss
def test_kernels_refuse_a_transformed_gradient(call, native):
    p, v = problem(call)
    velocity = v.float().requires_grad_()
    value = kernel(p)(velocity)
    ones = torch.ones_like(value)
    refused = pytest.raises(fk.BackendError, match="^grad: the kernels' backward pass has no forw")
    with forward_ad.dual_level(), refused:
        dual = forward_ad.make_dual(ones, ones)
        torch.autograd.grad(value, velocity, dual, retain_graph=True)
    with refused:
        torch.autograd.grad(value, velocity, torch.stack([ones, ones]), is_grads_batched=True)
    after = torch.autograd.grad(value, velocity, ones)[0]  # a refusal costs nothing that was kept
    assert torch.equal(after, torch.autograd.grad(kernel(p)(velocity), velocity, ones)[0])


@every_loss
def test_the_reference_takes_a_transformed_gradient(call):
    p, v = problem(call)
    value = reference(p)(velocity := v.requires_grad_())
    ones = torch.ones_like(value)
    weights = torch.stack([ones, -2 * ones])
    first = torch.autograd.grad(value, velocity, ones, retain_graph=True)[0]
    both = torch.autograd.grad(value, velocity, weights, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(both[0], torch.stack([first, -2 * first]))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(ones, weights[1])
        out = torch.autograd.grad(value, velocity, dual)[0]
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, -2 * first)
