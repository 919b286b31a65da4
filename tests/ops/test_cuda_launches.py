"""The native CUDA kernels up to their launch, on a driver that records and runs nothing."""

import os
import subprocess
import sys

import calls
import pytest
import stub_driver
import torch

import flowkern as fk
from flowkern.ops._common import native_cuda

pytest.importorskip("pybind11")
IS_ALONE = os.environ.get("FLOWKERN_STUB_DRIVER") == "1"
alone = pytest.mark.skipif(
    stub_driver.why_not() is not None or not IS_ALONE,
    reason=str(stub_driver.why_not() or "runs in a process of its own, below"),
)


@pytest.mark.skipif(stub_driver.why_not() is not None, reason=str(stub_driver.why_not()))
@pytest.mark.skipif(IS_ALONE, reason="this is that process")
def test_launches_in_a_process_of_its_own():
    """A process that has loaded the driver keeps it, and one loaded before would be found."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"FLOWKERN_STUB_DRIVER": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


# What each verb launches, whatever the size and the arguments.
LAUNCHED = {
    "sde_step": ["sde_draw"],
    "ode_step": ["sde_draw"],
    "sde_log_prob": ["sde_replay", "sde_replay_backward"],
    "policy_loss": ["policy_forward", "policy_backward"],
    "matching_loss": ["matching_forward", "matching_backward"],
    "add_noise": ["add_noise"],
    "philox_normal": ["fill_philox"],
}
WITH_MEAN = {
    "sde_step": ["sde_draw_mean"],
    "sde_log_prob": ["sde_replay_mean", "sde_mean_backward"],
}


def launched(call):
    more = call.has("return_mean") or call.has("round_dtype")
    return (WITH_MEAN if more else LAUNCHED)[call.verb]


CALLS = calls.take(("has no native kernel there", lambda call: call.op == "guidance"))


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    driver = stub_driver.load(folder)
    return driver, stub_driver.native_kernels(folder), folder


@pytest.fixture
def driver(stub):
    driver, module, _ = stub
    driver.clear()
    with stub_driver.tensors_on_cuda(), stub_driver.native_on(module, stream=77):
        yield driver


@alone
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_one_launch_per_direction_on_the_stream(driver, call):
    calls.Problem(call, 3, 5000).run("native")
    found = driver.launches()
    assert [launch.name for launch in found] == launched(call)
    # 5,000 elements are five tiles of 128 threads with eight each; where no latent is read, a warp.
    expected = [((15, 1, 1), (128, 1, 1))] * len(found)
    if str(call) in ("policy_loss, on policy", "policy_loss, on policy, guard"):
        expected[0] = ((3, 1, 1), (32, 1, 1))
    assert [(launch.grid, launch.block) for launch in found] == expected
    assert {(launch.stream, launch.device) for launch in found} == {(77, 0)}


@alone
def test_outputs_share_one_allocation(driver):
    for verb in ("policy_loss", "matching_loss"):
        out = calls.Problem(verb).run("native", learn=False)
        assert len({x.untyped_storage().data_ptr() for x in out}) == 1
        assert all(x.data_ptr() % 16 == 0 and not x._is_view() for x in out)
        before = [x._version for x in out]
        out[1].zero_()  # the versions of the others, one of them saved for backward, stay
        assert [x._version for x in out] == [before[0], before[1] + 1, *before[2:]]


@alone
def test_a_capture_gets_scratch_of_its_own_and_clears_it(driver, monkeypatch):
    asked = []
    given = stub_driver.memory_of_the_host
    monkeypatch.setattr(
        stub_driver, "memory_of_the_host", lambda *a: asked.append(a[-1]) or given(*a)
    )
    problems = [calls.Problem(verb, 3, 5000) for verb in ("sde_step", "policy_loss")]
    module = fk.ops._common.native.cuda()
    with stub_driver.native_on(module, stream=78):
        for captured in (0, 78, 77, 78):
            driver.capture(captured)
            for p in problems:
                p.run("native", learn=False)
        driver.capture(0)
    # Kept from the first call on; a capture of another stream is not ours.
    assert asked == [False, True, True, True, True]


@alone
def test_many_samples_come_sorted_and_few_do_not(driver, monkeypatch):
    p = calls.Problem("policy_loss", 4, 16)
    edge = calls.GRID[0].to("cpu", torch.float32)
    for batch, is_sorted in ((1024, False), (1025, True)):
        row = torch.randint(-1, 5, (batch,))  # two of the values are out of range
        found = []
        monkeypatch.setattr(native_cuda, "siblings", None)
        x = torch.zeros(batch, 16)
        from flowkern.ops._common import native

        native.connect(
            native.cuda(), native.private.exchange, native._CPU, stream=lambda index: 0,
            scratch=stub_driver.memory_of_the_host,
            siblings=lambda row, rows, found=found: found.append(rows) or SIBLINGS(row, rows),
        )  # fmt: skip
        fk.policy_loss(
            p["velocity"], p["x_t"], x, edge, torch.zeros(batch), row, p["old_velocity"],
            backend="native",
        ).loss.backward()  # fmt: skip
        assert found == [4, 4] * is_sorted


SIBLINGS = native_cuda.siblings


@alone
def test_the_order_of_siblings():
    row = torch.tensor([2, 0, 2, 9, -4, 0, 2])
    order, first = SIBLINGS(row, 4)
    assert order.tolist() == [1, 4, 5, 0, 2, 6, 3] and first.tolist() == [0, 3, 3, 6, 7]


@alone
def test_values_are_not_read_on_the_host(stub):
    """Every argument lies in memory that must not be touched: a look at it ends the process."""
    code = """
import ctypes, mmap, sys, torch
sys.path.insert(0, sys.argv[2])
import calls, stub_driver, importlib.util
folder = sys.argv[1]
driver = stub_driver.Driver(ctypes.CDLL(folder + "/libcuda.so.1", mode=ctypes.RTLD_GLOBAL))
spec = importlib.util.spec_from_file_location("_cuda", folder + "/_cuda.so")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
kept, protect = [], ctypes.CDLL(None).mprotect
def apart(x):
    kept.append(mmap.mmap(-1, x.numel() * x.element_size()))
    y = torch.frombuffer(kept[-1], dtype=x.dtype, count=x.numel()).view(x.shape)
    kept.append(y.data_ptr())
    return y.copy_(x)
served = [call for call in calls.CALLS if call.op != "guidance"]  # which has no native kernel there
problems = [calls.Problem(call, 3, 5000).changed(apart) for call in served]
for memory, address in zip(kept[::2], kept[1::2]):
    assert protect(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), 0) == 0
with stub_driver.tensors_on_cuda(), stub_driver.native_on(module):
    for p in problems:
        p.run("native")
print(driver.count)
"""
    here = str(stub_driver.HERE.parent)
    command = [sys.executable, "-c", code, str(stub[2]), here]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(len(launched(call)) for call in CALLS)


@alone
def test_what_is_not_read_as_it_is_goes_through_python(driver):
    """Permuted, of another integer dtype, in float64 tables: copied or converted, then launched."""
    given, keyed = calls.Problem("sde_step, noise given"), calls.Problem("sde_step")
    x = given["x_t"].unflatten(1, (5, 8)).transpose(1, 2)
    given.run("native", x_t=x, velocity=x, noise=given["noise"].unflatten(1, (8, 5)))
    keyed.run("native", c_rows=calls.GRID[3], step=torch.ones(3).int())
    calls.Problem("ode_step, guided, order 3").run("native", m_rows=calls.SOLVERS["m_rows"])
    assert [launch.name for launch in driver.launches()] == ["sde_draw"] * 3
