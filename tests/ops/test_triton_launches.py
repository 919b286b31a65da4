"""Triton's real way to a launch, without a GPU: its binder, its compiler for sm_90, its launcher in
C, against a driver that records launches and runs nothing (stub_driver).

`python tests/ops/test_triton_launches.py` prints the host time of each verb.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import flowkern as fk
from flowkern import torch_private
from flowkern.ops._common import dispatch, philox
from flowkern.ops.matching_loss import api as matching_api
from flowkern.ops.policy_loss import api as policy_api
from flowkern.ops.sde_step import api as step_api
from flowkern.schedules import multistep_coefficients

sys.path.insert(0, str(Path(__file__).parent))
import calls
import stub_driver

B, D, VIDEO = 8, 65_536, 2**18 + 4096
PROGRAMS = B * D // 1024
SOLVER = multistep_coefficients((0.9, 0.8, 0.7), 2).to("cpu", torch.float32)


def solve(p, backend):
    return fk.ode_step(p.x, p.old, SOLVER, [p.ref], p.noise, 4.5, return_x0=True, backend=backend)


def siblings(p, backend):
    """Two samples to a velocity row, or as many as make a batch beyond a look at each."""
    batch = 1500 if p.shape[1] < 100 else 2 * B
    of_samples = torch.zeros(batch)
    row, x_next = torch.arange(batch) % B, p.x_next[:1].expand(batch, -1)
    out = fk.policy_loss(
        p.v, p.x, x_next, p.rows[0], of_samples, row, old_velocity=p.old, backend=backend
    )
    return torch.autograd.grad(out.loss, p.v, p.one)


def on_policy(p, backend):
    return calls.trained(p, calls.policy(p, backend, old_velocity=None))


def draw_and_learn(p, backend):
    calls.VERBS["draw"][0](p, backend)
    return calls.VERBS["policy, gradient"][0](p, backend)


LONG = {"batch": 2, "size": VIDEO, "dtype": torch.bfloat16}
MORE = {  # name: (arguments, call, programs of each launch)
    "solver": ({}, solve, [PROGRAMS]),
    "on policy": ({}, on_policy, [B, PROGRAMS]),
    "siblings": ({}, siblings, [PROGRAMS, PROGRAMS]),
    "many siblings": ({"size": 16}, siblings, [B, B]),
    "long samples of 16 bits": (
        LONG,
        draw_and_learn,
        [2 * -(-VIDEO // block) for block in (2048, 2048, 1024)],
    ),
}
VERBS = {
    name: ({}, call, [PROGRAMS] * (2 if "gradient" in name or "drawn" in name else 1))
    for name, (call, _) in calls.VERBS.items()
} | MORE
for name in ("policy, guard, KL", "matching, nft"):
    VERBS[name] = (*VERBS[name][:2], [PROGRAMS, PROGRAMS])


@contextlib.contextmanager
def on_the_stub(folder, entered):
    """Triton serves, on a device that torch takes for the current one, 0; `entered` by others."""

    @contextlib.contextmanager
    def device_of(x):
        entered.append(x.get_device())
        yield

    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.current_stream = lambda device: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.device_of = device_of
    torch_private.raw_stream = lambda device: 0
    for owner in (step_api, policy_api.LOSS, matching_api.LOSS, philox):
        for impls in vars(owner).values():
            if isinstance(impls, tuple) and impls and isinstance(impls[0], dispatch.Impl):
                for impl in impls:
                    object.__setattr__(impl, "why_not", dispatch.no_objection)
    driver = stub_driver.load(folder)
    with stub_driver.tensors_on_cuda(), stub_driver.triton_on(driver, folder):
        yield driver


def report(folder):
    """(kernel, programs, threads) of the launches of each verb; devices entered on the way."""
    made = {name: calls.Arguments("cpu", **arguments) for name, (arguments, *_) in VERBS.items()}
    found, entered = {}, []
    with on_the_stub(folder, entered) as driver:
        for name, (_, call, _) in VERBS.items():
            driver.clear()
            call(made[name], "triton")
            found[name] = [(x.name, x.grid[0], x.block[0]) for x in driver.launches()]
            assert not entered, name
        torch.Tensor.get_device = lambda self: 1
        name, (_, call, _) = next(iter(VERBS.items()))
        call(made[name], "triton")
    return {"launches": found, "entered": entered}


@pytest.mark.skipif(stub_driver.why_not() is not None, reason=str(stub_driver.why_not()))
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted")
@pytest.mark.long(50)
def test_every_verb_launches(tmp_path):
    """In a process of its own, as the stub stays loaded and tensors pretend."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, tmp_path],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found["entered"]) == {1}  # the current device is not set again
    launches = found["launches"]
    for name, (_, _, programs) in VERBS.items():
        assert [launch[1] for launch in launches[name]] == programs, (name, launches[name])
        assert {launch[2] for launch in launches[name]} == {128}


def microseconds(call, rounds=200, repeated=5):
    """The fastest round of calls, per call."""
    call()
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(repeated):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / repeated * 1e6


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss, gradient):
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient, None, None


def host_times(folder):
    """Of small latents: what a call costs the host, and what of it is torch's and Triton's."""
    import triton

    @triton.jit
    def nothing_kernel(x_ptr, y_ptr, size):
        pass

    torch.set_num_threads(1)
    p = calls.Arguments("cpu", size=256)
    with on_the_stub(folder, []):
        for name, (arguments, call, _) in VERBS.items():
            if not arguments:
                yield name, microseconds(lambda call=call: call(p, "triton"))
        nothing = lambda: Nothing.apply(p.v, torch.empty(()), p.old)  # noqa: E731
        yield (
            "an empty autograd.Function, both ways",
            microseconds(lambda: torch.autograd.grad(nothing(), p.v, p.one)),
        )
        yield (
            "a launch of three arguments",
            microseconds(lambda: nothing_kernel[(1,)](p.x, p.v, 7)),
        )
        yield "torch.empty", microseconds(lambda: torch.empty(8))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(report(Path(sys.argv[1]))))
    else:
        print("us per call, fastest of 200 rounds of 5; launches go nowhere, memory is the host's")
        with tempfile.TemporaryDirectory() as stub:
            for verb, time_of_call in host_times(Path(stub)):
                print(f"{verb:40}{time_of_call:8.1f}", flush=True)
