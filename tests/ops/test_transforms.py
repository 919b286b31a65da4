"""Forward mode and torch.func: served by the reference, refused in words by the kernels, which
would drop a tangent and cannot see into a wrapped tensor.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern as fk
from flowkern.schedules import multistep_coefficients, sd3_sigmas, step_coefficients

C = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[3]
M = multistep_coefficients((0.9, 0.8, 0.7), 2)
X, V, T, NOISE, OLD = torch.randn(
    5, 2, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64
).unbind()
ADVANTAGE = torch.tensor([1.0, -1.0], dtype=torch.float64)
CLIP = {"clip_low": 0.99, "clip_high": 9.0}

DRAWS = {
    "sde_step": lambda v, x, **k: fk.sde_step(x(X), v, C, noise=x(NOISE), **k)[0],
    "ode_step": lambda v, x, **k: fk.ode_step(x(X), v, M, history=[x(OLD)], **k),
    "add_noise": lambda v, x, **k: fk.add_noise(v, 0.3, noise=x(NOISE), **k),
}
LOSSES = {
    "sde_log_prob": lambda v, x, **k: fk.sde_log_prob(x(X), v, x(NOISE), C, **k),
    "policy_loss": lambda v, x, **k: (
        fk.policy_loss(v, x(X), x(NOISE), C, x(ADVANTAGE), old_velocity=x(OLD), **CLIP, **k).loss
    ),
    "matching_loss": lambda v, x, **k: (
        fk.matching_loss(
            v, x(X), 0.3, x(ADVANTAGE), noise=x(NOISE), old_velocity=x(OLD), **CLIP, **k
        ).loss
    ),
}
OPS = DRAWS | LOSSES


def reference(name):
    """The op as a function of its first latent, in float64."""
    return lambda v: OPS[name](v, lambda t: t, backend="reference")


def kernel(name):
    """The same on the kernels, in float32."""
    return lambda v: OPS[name](v, torch.Tensor.float, backend="native")


@pytest.fixture
def native():
    if fk.backends()["native"] is not None:
        pytest.skip(fk.backends()["native"])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_forward_mode_of_the_reference(name, requires_grad):
    op, step = reference(name), 1e-5
    difference = (op(V + step * T) - op(V - step * T)) / (2 * step)
    assert difference.abs().max() > 1e-3
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(V.clone().requires_grad_(requires_grad), T)
        tangent = forward_ad.unpack_dual(op(dual)).tangent
    torch.testing.assert_close(tangent.detach(), difference, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(jvp(op, (V,), (T,))[1], difference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_torch_func_on_the_reference(name):
    op = reference(name)
    velocity = V.clone().requires_grad_()
    expected = torch.autograd.grad(op(velocity).sum(), velocity)[0]
    torch.testing.assert_close(grad(lambda v: op(v).sum())(V), expected)
    both = torch.stack([V, V + T])
    torch.testing.assert_close(vmap(op)(both), torch.stack([op(v) for v in both]))
    second = torch.func.hessian(lambda v: op(v).sum())(V).reshape(V.numel(), -1)
    step = 1e-5  # a Hessian is forward mode over reverse mode
    slope = lambda v: grad(lambda v: op(v).sum())(v)  # noqa: E731
    difference = (slope(V + step * T) - slope(V - step * T)) / (2 * step)
    torch.testing.assert_close((second @ T.flatten()).reshape(T.shape), difference)


def test_second_derivative_of_the_reference():
    """By hand: log_prob is a parabola in the velocity, of curvature -2 k b^2 / D."""
    velocity = V.clone().requires_grad_()
    log_prob = reference("sde_log_prob")(velocity).sum()
    first = torch.autograd.grad(log_prob, velocity, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), velocity)[0]
    expected = torch.full_like(V, float(-2 * C.k * C.b**2 / V.shape[1]))
    torch.testing.assert_close(second, expected)


REFUSAL = "its kernels have no forward mode and cannot see into what torch.func wraps"


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_kernels_refuse_forward_mode(name, requires_grad, native):
    op, velocity = kernel(name), V.float().requires_grad_(requires_grad)
    plain = op(velocity)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(velocity, T.float())
        with pytest.raises(fk.BackendError, match=f"^backend='native' cannot serve .*: {REFUSAL}"):
            op(dual)
    assert torch.equal(op(velocity), plain)


@pytest.mark.parametrize("name", OPS)
def test_without_a_name_the_reference_serves(name):
    """In float32, where kernels would be the best."""
    by_default, by_name = (
        lambda v, named=named: OPS[name](v, torch.Tensor.float, **named)
        for named in ({}, {"backend": "reference"})
    )
    v, t = V.float(), T.float()
    for got, expected in zip(jvp(by_default, (v,), (t,)), jvp(by_name, (v,), (t,)), strict=True):
        assert torch.equal(got, expected)
    with forward_ad.dual_level():
        got, expected = (
            forward_ad.unpack_dual(op(forward_ad.make_dual(v, t))).tangent
            for op in (by_default, by_name)
        )
        assert expected.abs().max() > 1e-3 and torch.equal(got, expected)
    if name in LOSSES:
        assert torch.equal(*(grad(lambda v, op=op: op(v).sum())(v) for op in (by_default, by_name)))
        assert torch.equal(*(vmap(op)(torch.stack([v, t])) for op in (by_default, by_name)))


@pytest.mark.parametrize("name", OPS)
def test_a_mode_that_looks_on_costs_no_tangent(name):
    class Onlooker(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    expected = jvp(reference(name), (V,), (T,))[1]
    with Onlooker(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(reference(name)(forward_ad.make_dual(V, T))).tangent
    assert torch.equal(tangent, expected)


@pytest.mark.parametrize("name", OPS)
def test_kernels_refuse_torch_func(name, native):
    op, v, t = kernel(name), V.float(), T.float()
    scale, batch = torch.tensor(2.0), torch.stack([V.float(), T.float()])
    for call in (
        lambda: jvp(op, (v,), (t,)),
        lambda: vjp(op, v),
        lambda: grad(lambda v: op(v).sum())(v),
        lambda: jacrev(op)(v),
        lambda: vmap(op)(batch),
        lambda: functionalize(op)(v),
        lambda: grad(lambda s: (s * op(v)).sum())(scale),  # the op's own outputs are wrapped, too
    ):
        with pytest.raises(fk.BackendError, match=f"^backend='native' cannot serve .*: {REFUSAL}"):
            call()


def test_noise_under_torch_func(native):
    draw = lambda s, **k: s * fk.philox_normal((2, 8), 1, [0, 1], 2, **k)  # noqa: E731
    with pytest.raises(fk.BackendError, match=REFUSAL):
        jvp(lambda s: draw(s, backend="native"), (torch.ones(()),), (torch.ones(()),))
    served = jvp(draw, (torch.ones(()),), (torch.ones(()),))
    assert torch.equal(served[1], draw(1.0))


@pytest.mark.parametrize("name", OPS)
def test_compiled_kernels_refuse_forward_mode(name, native):
    torch.compiler.reset()
    velocity = V.float()
    compiled = torch.compile(kernel(name), fullgraph=True, backend="aot_eager")
    plain = compiled(velocity)
    with forward_ad.dual_level(), pytest.raises(Exception, match=REFUSAL):
        compiled(forward_ad.make_dual(velocity, T.float()))
    assert torch.equal(compiled(velocity), plain)


@pytest.mark.parametrize("name", LOSSES)
def test_kernels_refuse_a_transformed_gradient(name, native):
    velocity = V.float().requires_grad_()
    value = kernel(name)(velocity)
    ones = torch.ones_like(value)
    refused = pytest.raises(fk.BackendError, match="^grad: the kernels' backward pass has no forw")
    with forward_ad.dual_level(), refused:
        dual = forward_ad.make_dual(ones, ones)
        torch.autograd.grad(value, velocity, dual, retain_graph=True)
    with refused:
        torch.autograd.grad(value, velocity, torch.stack([ones, ones]), is_grads_batched=True)
    after = torch.autograd.grad(value, velocity, ones)[0]  # a refusal costs nothing that was kept
    assert torch.equal(after, torch.autograd.grad(kernel(name)(velocity), velocity, ones)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_takes_a_transformed_gradient(name):
    velocity = V.clone().requires_grad_()
    value = reference(name)(velocity)
    ones = torch.ones_like(value)
    weights = torch.stack([ones, -2 * ones])
    first = torch.autograd.grad(value, velocity, ones, retain_graph=True)[0]
    both = torch.autograd.grad(value, velocity, weights, is_grads_batched=True, retain_graph=True)[
        0
    ]
    torch.testing.assert_close(both, torch.stack([first, -2 * first]))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(ones, weights[1])
        out = torch.autograd.grad(value, velocity, dual)[0]
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, -2 * first)
