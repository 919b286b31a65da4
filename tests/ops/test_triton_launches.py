"""Triton's real way to a launch, without a GPU: its binder, its compiler for sm_90, its launcher in
C, against a driver that records launches and runs nothing (stub_driver).

`python tests/ops/test_triton_launches.py` prints the host time of each call.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import calls
import pytest
import stub_driver
import torch

from flowkern import torch_private
from flowkern.ops._common import dispatch

B, D, VIDEO = 8, 65_536, 2**18 + 4096
PROGRAMS = B * D // 1024
TAKEN = ("ode_step, guided, order 3", "policy_loss, on policy")
CALLS = calls.take(
    calls.FEW,
    (
        "has no kind of argument that others lack, which a launch would see",
        lambda call: not call.is_first and str(call) not in TAKEN,
    ),
)
# Of what does not launch a program to each tile of 1,024 elements, each way: on policy no latent is
# read; a sample of channels alone is one token; long samples have larger tiles forward.
OTHERS = {"policy_loss, on policy": [B, PROGRAMS], "rescaled_guidance": [B, B]}
LONG = [2 * -(-VIDEO // block) for block in (2048, 1024)]
LAUNCHED = [  # a problem, and the programs of each of its launches
    *[((c, B, D), OTHERS.get(str(c), [PROGRAMS] * (2 if c.learned else 1))) for c in CALLS],
    (("policy_loss, siblings", 750, 16), [750, 750]),  # a batch beyond a look at each
    (("sde_step", 2, VIDEO), LONG[:1]),
    (("policy_loss", 2, VIDEO, torch.bfloat16), LONG),
]


@contextlib.contextmanager
def on_the_stub(folder, entered):
    """Triton serves, on a device that torch takes for the current one, 0; `entered` by others."""
    importlib.import_module("flowkern.ops._common.rows_triton")  # before it is told what is not so

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
    dispatch.interpreting = lambda: True  # then Triton serves tensors of the CPU
    driver = stub_driver.load(folder)
    with stub_driver.tensors_on_cuda(), stub_driver.triton_on(driver, folder):
        yield driver


def report(folder):
    """(kernel, programs, threads) of the launches of each problem; devices entered on the way."""
    problems, found, entered = [calls.Problem(*problem) for problem, _ in LAUNCHED], [], []
    with on_the_stub(folder, entered) as driver:
        for p in problems:
            driver.clear()
            p.run("triton")
            found.append([(x.name, x.grid[0], x.block[0]) for x in driver.launches()])
            assert not entered, str(p.call)
        torch.Tensor.get_device = lambda self: 1
        problems[0].run("triton")
    return {"launches": found, "entered": entered}


@pytest.mark.skipif(stub_driver.why_not() is not None, reason=str(stub_driver.why_not()))
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted")
@pytest.mark.long(50)
def test_every_call_launches(tmp_path):
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
    for (problem, programs), launches in zip(LAUNCHED, found["launches"], strict=True):
        assert [launch[1] for launch in launches] == programs, (str(problem[0]), launches)
        assert {launch[2] for launch in launches} == {128}


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
    problems = [calls.Problem(call, B, 256) for call in CALLS]
    learned = calls.Problem("policy_loss", B, 256)
    v, old, one = learned["velocity"], learned["old_velocity"], learned.weight
    with on_the_stub(folder, []):
        for p in problems:
            yield str(p.call), microseconds(lambda p=p: p.run("triton"))
        nothing = lambda: Nothing.apply(v, torch.empty(()), old)  # noqa: E731
        yield (
            "an empty autograd.Function, both ways",
            microseconds(lambda: torch.autograd.grad(nothing(), v, one)),
        )
        yield (
            "a launch of three arguments",
            microseconds(lambda: nothing_kernel[(1,)](old, v, 7)),
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
