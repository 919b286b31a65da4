"""The kernels on a CUDA device: every backend that serves there, against the reference and float64,
in CUDA graphs, without synchronization, in how many launches and how much memory.
"""

import random

import fuzz
import pytest
import torch
from calls import FEW, GRID, KEEPING, REPLAYS, Problem, take, twice

import flowkern as fk
from flowkern.schedules import KINDS, device_coefficients, edge_coefficients, sd3_sigmas

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

BACKENDS = [name for name in ("triton", "native") if fk.backends("cuda")[name] is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DEVICE = torch.device("cuda", torch.cuda.current_device())
GRID_ON_HOST = sd3_sigmas(10).float()


CALLS = take(
    FEW, ("has no native kernel there: test_triton.py", lambda call: call.op == "guidance")
)
every_call = pytest.mark.parametrize("call", CALLS, ids=str)


def make(call, size=65_536, batch=8, dtype=torch.float32):
    return Problem(call, batch, size, dtype, device=DEVICE)


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# ---- the numbers ----


@every_backend
@pytest.mark.parametrize("block", range(6))
def test_random_calls(backend, block):
    """As tests/fuzz makes and checks them: any op, shape, stride, dtype, edge."""
    backends = fuzz.serving(fuzz.OPS, backend, "cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # what nobody writes is NaN
    try:
        for index in range(8 * block, 8 * (block + 1)):
            fuzz.one_call(fuzz.OPS, backends, f"0:{index}", "cuda")
    finally:
        torch.use_deterministic_algorithms(False)


@every_backend
@pytest.mark.parametrize("op", fuzz.OPS, ids=lambda op: op.name)
def test_samples_of_many_tiles(op, backend):
    """The size of a video, and a remainder: kernels may cut such samples otherwise."""
    backend, reason = fuzz.serving([op], backend, "cuda")[op.name]
    assert reason == "" or "no native kernel for CUDA devices" in reason
    for seed in ("many tiles", "more tiles"):
        draw = fuzz.Draw(random.Random(seed), "cuda")
        draw.size, draw.is_wild, draw.odd = (lambda: 2**18 + 4099), False, ()
        fuzz.check_drawn(op, draw, backend)


@every_backend
def test_noise_has_the_bits_of_the_cpu(backend):
    ids, steps = torch.tensor([0, 7, 2**31, 2**40 + 5, -3]), torch.tensor([0, 1, 2, 2**28 - 1, 5])
    for seed in (0, -1, 2**63 + 12345):
        for shape in ((5, 4099), (5, 3, 1), (5, 65_536)):
            on_cpu = fk.philox_normal(shape, seed, ids, steps, "match", backend="reference")
            key = (seed, ids.to(DEVICE), steps.to(DEVICE), "match")
            got = fk.philox_normal(shape, *key, backend=backend)
            assert torch.equal(got.cpu().view(torch.int32), on_cpu.view(torch.int32))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replay_is_the_draw_bit_for_bit_in_any_batch(backend, dtype):
    p = make("sde_step", 70_001, 6, dtype)
    x_next, drawn = p.run(backend)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=DEVICE)
    for split in ([6], [1, 5], [2, 2, 2]):
        for i in order.split(split):
            part = (p["x_t"][i], p["velocity"][i], x_next[i], p["c_rows"][i])
            assert torch.equal(fk.sde_log_prob(*part, backend=backend), drawn[i])


@every_backend
@every_call
def test_the_same_bits_each_time(call, backend):
    p = make(call)
    first = p.run(backend)
    assert all(same(first, p.run(backend)) for _ in range(5))
    assert all(torch.isfinite(x).all() for x in first)


@every_backend
def test_two_streams_at_once(backend):
    """What kernels keep between launches is kept per stream."""
    problems = [[make("sde_step"), make("policy_loss")] for _ in range(2)]
    for p in problems[1]:
        p.renew(1)
    expected = [[p.run(backend) for p in both] for both in problems]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = ([], [])
    for _ in range(20):
        for both, stream, found in zip(problems, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append([p.run(backend) for p in both])
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        assert all(all(map(same, one, wanted)) for one in found)


@every_backend
def test_more_elements_than_32_bits_count(backend):
    batch, size = 3, 2**30 + 8
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    x = torch.zeros(batch, size, dtype=torch.bfloat16, device=DEVICE)
    x[:, -4096:] = torch.randn(batch, 4096, device=DEVICE)
    rows, ids = GRID[torch.arange(3)].to(DEVICE, torch.float32), torch.arange(3, device=DEVICE)
    x_next, drawn = fk.sde_step(x, x, rows, seed=1, sample_id=ids, step=2, backend=backend)
    key = {"seed": 1, "sample_id": ids[2:], "step": 2}
    alone = fk.sde_step(x[2:], x[2:], rows[2:], **key, backend=backend)
    assert torch.equal(x_next[2, -8192:], alone[0][0, -8192:])
    assert torch.equal(drawn[2:], alone[1])
    assert torch.equal(fk.sde_log_prob(x, x, x_next, rows, backend=backend), drawn)


# Native kernels alone keep a replay's.
KEPT = [(name, c) for name in BACKENDS for c in (*KEEPING, *(REPLAYS * (name == "native")))]


@pytest.mark.parametrize("backend, call", KEPT, ids=str)
def test_the_residual_kept_forward_is_the_gradient_once(backend, call):
    for size in (1001, 65_536):
        twice(make(call, size), backend)


# ---- what the host does ----


@every_backend
@every_call
def test_in_a_cuda_graph(call, backend):
    """Captured once, replayed on new values: as the eager call, each time."""
    p = make(call)
    p.run(backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        p.run(backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = p.run(backend)
    for seed in range(3):
        p.renew(seed)
        graph.replay()
        assert same(captured, p.run(backend))


@every_backend
@every_call
def test_no_synchronization(call, backend):
    p = make(call)
    p.run(backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.run(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_tensors(kind):
    """Made in one launch, without a synchronization, in a graph too: the host's, to rounding."""
    s, n = GRID_ON_HOST[:-1], GRID_ON_HOST[1:]
    level, second = 0.3 + 0.4 * s, GRID_ON_HOST[1]
    expected = device_coefficients(s, n, kind, level, second).table
    given = [x.to(DEVICE) for x in (s, n, level, second)]
    make = lambda: device_coefficients(*given[:2], kind, *given[2:]).table  # noqa: E731
    make()  # compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = make()
        one = device_coefficients(given[0][:1], given[1][0], kind, 0.6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    near = {"rtol": 2**-23, "atol": 0}
    torch.testing.assert_close(made.cpu(), expected, **near)
    torch.testing.assert_close(one.table.cpu(), device_coefficients(s[0], n[0], kind, 0.6).table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = make()
    given[2].mul_(0.5)
    graph.replay()
    halved = device_coefficients(s, n, kind, 0.5 * level, second).table
    torch.testing.assert_close(captured.cpu(), halved, **near)
    with pytest.raises(ValueError, match="got one on cuda:.*device_coefficients takes it"):
        edge_coefficients(given[0], given[1], kind, 0.6)


@every_backend
@pytest.mark.parametrize(
    "call, learn",
    [(c, n) for c in CALLS for n in ((False, True) if c.learned else (False,))],
    ids=str,
)
def test_number_of_launches(call, learn, backend):
    """One of a draw, at most two per direction of a loss."""
    p = make(call)
    launches = None
    for _ in range(2):  # the profiler's first run may miss what it is still setting up for
        p.run(backend, learn)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            p.run(backend, learn)
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        launches = [e.name for e in profile.events() if e.device_type == on_device]
    if not launches:
        pytest.skip("the profiler sees no kernels on this machine")
    of_each = 2 if call.verb.endswith("_loss") else 1
    assert len(launches) <= of_each * (1 + learn), launches


@every_backend
@pytest.mark.parametrize("call", [c for c in CALLS if c.verb.endswith("_loss")], ids=str)
def test_peak_memory_is_the_inputs_and_one_gradient(call, backend):
    p = make(call, 2**18)
    p.run(backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    p.run(backend)
    more = torch.cuda.max_memory_allocated() - before
    gradient = p["velocity"].nbytes
    assert more <= 1.02 * gradient + 2**18, f"{more / gradient:.3f} of a gradient"


@every_backend
def test_compiles_whole(backend):
    """torch.compile with fullgraph, forward and backward, gives the eager results."""
    p, key = make("policy_loss", 4096, 4).arguments, make("sde_step", 4096, 4).arguments
    key = {name: key[name] for name in ("seed", "sample_id", "step")}

    def train(v):
        x, rows = p["x_t"], p["c_rows"]
        x_next, drawn = fk.sde_step(x, v.detach(), rows, **key, backend=backend)
        log_prob = fk.sde_log_prob(x, v * 1.0, x_next, rows, backend=backend)
        loss = fk.policy_loss(**p | {"velocity": v * 1.0, "x_next": x_next}, backend=backend).loss
        return drawn, log_prob, loss

    results = []
    for run in (train, torch.compile(train, fullgraph=True)):
        drawn, log_prob, loss = run(p["velocity"])
        gradients = torch.autograd.grad(log_prob.sum() + loss, p["velocity"])
        results.append((drawn, log_prob.detach(), loss.detach(), *gradients))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
    assert torch.equal(results[0][0], results[0][1])


def test_errors_name_the_device():
    p = make("sde_step", 8, 2)
    for name, wrong in (
        ("velocity", p["velocity"].cpu()),
        ("c_rows", GRID[0]),
        ("sample_id", torch.arange(2)),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected device {DEVICE}, got cpu"):
            p.run(**{name: wrong})
