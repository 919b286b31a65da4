"""Both halves of guidance learn where that is asked for: against torch's own derivative of
uncond + w (velocity - uncond), in float64."""

import pytest
import torch

import flowkern as fk
from flowkern.schedules import sd3_sigmas, step_coefficients

EDGES = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[torch.arange(4)]
ADVANTAGE = torch.linspace(-1, 1, 4)
CLIP = {"clip_low": 0.9, "clip_high": 9.0}  # far: the loss is differentiable
# A bound on the relative error of a gradient, from the rounding of inputs it is compared without.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}


def latents(dtype):
    generator = torch.Generator().manual_seed(1)
    x_t, x_next, old, v, uncond = torch.randn(5, 4, 50, generator=generator).to(dtype)
    return x_t, x_next, old, v.clone().requires_grad_(), uncond.clone().requires_grad_()


def policy(x_t, x_next, old, v, **guidance):
    advantage = ADVANTAGE.to(torch.promote_types(v.dtype, torch.float32))
    out = fk.policy_loss(v, x_t, x_next, EDGES, advantage, old_velocity=old, **CLIP, **guidance)
    return out.loss


def replay(x_t, x_next, old, v, **guidance):
    return (fk.sde_log_prob(x_t, v, x_next, EDGES, **guidance) * ADVANTAGE).sum()


def halves(call, w, dtype, **more):
    """The gradients of both, by the option."""
    *given, v, uncond = latents(dtype)
    guidance = {"velocity_uncond": uncond, "guidance_scale": w, "uncond_gradient": True}
    return torch.autograd.grad(call(*given, v, **guidance, **more), (v, uncond))


def truth(call, w, dtype):
    *given, v, uncond = (x.detach().double().requires_grad_() for x in latents(dtype))
    loss = call(*given, uncond + w * (v - uncond), backend="reference")
    return torch.autograd.grad(loss, (v, uncond))


@pytest.mark.parametrize("call", [policy, replay])
@pytest.mark.parametrize("w", [4.5, -1.5, 0.7, 1.0])
@pytest.mark.parametrize(
    "dtype, backend",
    [(torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "native"),
     (torch.bfloat16, "native")],
)  # fmt: skip
def test_both_gradients_are_those_of_the_guided_velocity(call, w, dtype, backend):
    if reason := fk.backends()[backend]:
        pytest.skip(reason)
    for found, expected in zip(
        halves(call, w, dtype, backend=backend), truth(call, w, dtype), strict=True
    ):
        error = (found.double() - expected).norm()
        assert found.dtype == dtype and error <= BOUND[dtype] * max(expected.norm(), 1e-12)


@pytest.mark.parametrize("call", [policy, replay])
def test_compilers_and_transforms_have_the_same(call):
    *given, v, uncond = latents(torch.float32)

    def loss(v, uncond):
        guidance = {"velocity_uncond": uncond, "guidance_scale": 3.0, "uncond_gradient": True}
        return call(*given, v, **guidance)

    expected = torch.autograd.grad(loss(v, uncond), (v, uncond))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(v, uncond), (v, uncond)), expected))
    transformed = torch.func.grad(loss, argnums=(0, 1))(v.detach(), uncond.detach())
    for found, one in zip(transformed, expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-7)


def test_without_the_option_the_second_half_is_a_constant_and_mistakes_are_named():
    *given, v, uncond = latents(torch.float32)
    guidance = {"velocity_uncond": uncond, "guidance_scale": 3.0}
    policy(*given, v, **guidance).backward()
    assert v.grad.any() and uncond.grad is None
    for call in (policy, replay):
        for change, message in (
            ({"velocity_uncond": None}, "uncond_gradient: needs velocity_uncond"),
            ({"guidance_scale": 0.0}, "uncond_gradient: velocity has no share"),
            ({"guidance_scale": "a"}, "guidance_scale: expected a finite number"),
        ):
            with pytest.raises(ValueError, match=message):
                call(*given, v, **guidance | change, uncond_gradient=True)
