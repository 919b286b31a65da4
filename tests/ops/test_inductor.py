"""The ops inside what torch.compile makes by default: inductor's fused loops around our kernels.

aot_eager, which the ops' own tests take, neither plans memory nor chooses layouts; inductor does,
and runs a mutating op in place where it finds that it can.
"""

import pytest
import torch
from calls import Problem, take


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    """Skips where inductor finds no C++ compiler; asked here, as asking imports inductor. Processes
    that compile for it would each import torch. Its loops are scalar: to vectorize them is its own
    business, of no layout and no buffer, and a fifth of the time.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"inductor finds no C++ compiler: {error}")
    with config.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        yield


SIZE = (4, 33)
SIBLINGS, MEAN = "policy_loss, siblings, all", "sde_log_prob, mean"
CALLS = take(
    (
        "takes seconds to compile: one of a verb, of the policy loss with siblings, and a mean",
        lambda call: (
            str(call) not in (SIBLINGS, MEAN) and (call.verb == "policy_loss" or not call.is_first)
        ),
    ),
    ("below", lambda call: call.verb == "sde_step"),
    ("the op of sde_step", lambda call: call.verb == "ode_step"),
    ("in the op of all that draw", lambda call: call.verb == "philox_normal"),
)


def network(x, weight):
    """What stands around an op: torch operations to fuse, a layout that is not the op's."""
    return (x.transpose(1, 2) * weight).tanh().transpose(1, 2)


def assert_compiled_is_eager(run, *tensors):
    """run(weight, *tensors) -> {name: tensor}: the same values, and the gradient of their sum.

    Equal up to float32: inductor's tanh is not torch's to the bit.
    """
    results = []
    for call in (run, torch.compile(run, fullgraph=True)):
        weight = torch.linspace(0.5, 1.5, SIZE[0]).requires_grad_()
        outputs = call(weight, *[x.clone() for x in tensors])
        sum(x.sum() for x in outputs.values() if x.is_floating_point()).backward()
        assert weight.grad.abs().min() > 0
        results.append({name: x.detach() for name, x in outputs.items()} | {"": weight.grad})
    for name, eager in results[0].items():
        torch.testing.assert_close(
            results[1][name], eager, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def sde_steps(p, weight, x, v, out):
    """Into new memory, into given memory, and over its own input, which is read again after."""
    velocity = network(v, weight)
    x_next, log_prob = p.run(x_t=x, velocity=velocity)
    again, _ = p.run(x_t=x, velocity=velocity, out=out)
    over, _ = p.run(x_t=x + 1, velocity=velocity, step=3, out=x)
    _, of_mean, mean = p.run(x_t=v, velocity=velocity, return_mean=True)  # with gradients
    results = x_next, log_prob, again + 1, over, x * 2, velocity, of_mean, mean * 2
    return dict(zip("abcdefgh", results, strict=True))


def test_every_op_in_one_graph():
    """Their latents come out of fused loops, and their results go into some. One graph, as each
    loop is compiled by itself, and takes seconds.
    """
    problems, step = [Problem(call, 3, SIZE) for call in CALLS], Problem("sde_step", 3, SIZE)
    latents = [p[name].detach() for p in problems for name in p.latents]

    def run(weight, x, v, into, *latents):
        latents, outputs = iter(latents), sde_steps(step, weight, x, v, into)
        for p in problems:
            given = {name: next(latents) * 2 for name in p.latents}
            first = p.call.learned or p.latents[0]
            given[first] = network(given[first], weight)
            out = p.run(None, False, **given)
            outputs[f"{p.call}: 0"] = out[0] * 2
            more = out if p.call.has("return_mean") else [out[0], *(x.detach() for x in out[1:])]
            outputs |= {f"{p.call}: {i}": x for i, x in enumerate(more) if i}
            outputs[f"{p.call}: {first}"] = given[first]
        return outputs

    assert_compiled_is_eager(run, step["x_t"], step["velocity"], torch.zeros(3, *SIZE), *latents)
