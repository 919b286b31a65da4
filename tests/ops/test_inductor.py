"""The ops inside what torch.compile makes by default: inductor's fused loops around our kernels.

aot_eager, which the ops' own tests take, neither plans memory nor chooses layouts; inductor does,
and runs a mutating op in place where it finds that it can. One op at a time; compiling takes
seconds, so no grid.
"""

import pytest
import torch

import flowkern as fk
from flowkern.schedules import sd3_sigmas, step_coefficients


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    """Skips where inductor finds no C++ compiler; asked here, as asking imports inductor."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"inductor finds no C++ compiler: {error}")


SHAPE = (3, 4, 33)
ROWS = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[torch.tensor([1, 4, 8])]
ROWS = ROWS.to(dtype=torch.float32)
KEY = {"seed": 5, "sample_id": torch.arange(3) + 7}
ADVANTAGE = torch.tensor([1.0, -0.5, 0.3])


def latents(count):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind()


def network(x, weight):
    """What stands around an op: torch operations to fuse, a layout that is not the op's."""
    return (x.transpose(1, 2) * weight).tanh().transpose(1, 2)


def assert_compiled_is_eager(run, *tensors):
    """run(weight, *tensors) -> tensors: the same values, and the same gradient of their sum.

    Equal up to float32: inductor's tanh is not torch's to the bit.
    """
    results = []
    for call in (run, torch.compile(run, fullgraph=True)):
        weight = torch.linspace(0.5, 1.5, SHAPE[1]).requires_grad_()
        outputs = call(weight, *[x.clone() for x in tensors])
        sum(x.sum() for x in outputs if x.is_floating_point()).backward()
        assert weight.grad.abs().min() > 0
        results.append((*[x.detach() for x in outputs], weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_sde_step():
    """Into new memory, into given memory, and over its own input, which is read again after."""

    def run(weight, x, v, out):
        velocity = network(v, weight)
        x_next, log_prob = fk.sde_step(x, velocity, ROWS, **KEY, step=2)
        again, _ = fk.sde_step(x, velocity, ROWS, **KEY, step=2, out=out)
        over, _ = fk.sde_step(x + 1, velocity, ROWS, **KEY, step=3, out=x)
        return x_next, log_prob, again + 1, over, x * 2, velocity

    assert_compiled_is_eager(run, *latents(3))


def test_sde_log_prob():
    def run(weight, x, v, x_next):
        return (fk.sde_log_prob(x, network(v, weight), x_next + 1, ROWS) * 2,)

    assert_compiled_is_eager(run, *latents(3))


def test_policy_loss():
    row, old_row = torch.tensor([2, 0, 2]), latents(4)[3]

    def run(weight, x, v, x_next):
        out = fk.policy_loss(
            network(v, weight), x, x_next, ROWS, ADVANTAGE, row=row, old_velocity=old_row.tanh(),
            velocity_ref=x, kl_coef=0.1, clip_low=0.999, clip_high=1e6,
        )  # fmt: skip
        return out.loss, *[x.detach() for x in out[1:]]

    assert_compiled_is_eager(run, *latents(3))


def test_add_noise_and_matching_loss():
    sigma = torch.tensor([0.2, 0.5, 0.8])

    def run(weight, x0, v):
        x_t = fk.add_noise(x0 * 2, sigma, **KEY)
        velocity = network(v + x_t, weight)
        out = fk.matching_loss(velocity, x0 * 2, sigma, ADVANTAGE, **KEY, old_velocity=v.sin())
        return out.loss, *[x.detach() for x in out[1:]], x_t

    assert_compiled_is_eager(run, *latents(2))
