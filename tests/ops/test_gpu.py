"""The kernels on a CUDA device: every backend that serves there, against the reference and float64,
in CUDA graphs, without synchronization, in how many launches and how much memory.
"""

import random

import fuzz
import pytest
import torch
from calls import GRID, VERBS, Arguments, call

import flowkern as fk

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

BACKENDS = [name for name in ("triton", "native") if fk.backends("cuda")[name] is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DEVICE = torch.device("cuda", torch.cuda.current_device())


every_verb = pytest.mark.parametrize("verb", VERBS)


def make(batch=8, size=65_536, dtype=torch.float32):
    return Arguments(DEVICE, batch, size, dtype)


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
    p = make(6, 70_001, dtype)
    velocity = p.v.detach()
    x_next, drawn = fk.sde_step(p.x, velocity, p.rows, **p.key, backend=backend)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=DEVICE)
    for split in ([6], [1, 5], [2, 2, 2]):
        for i in order.split(split):
            part = (p.x[i], velocity[i], x_next[i], p.rows[i])
            assert torch.equal(fk.sde_log_prob(*part, backend=backend), drawn[i])


@every_backend
@every_verb
def test_the_same_bits_each_time(verb, backend):
    p = make()
    first = call(verb, p, backend)
    for _ in range(5):
        again = call(verb, p, backend)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(torch.isfinite(x).all() for x in first)


@every_backend
def test_two_streams_at_once(backend):
    """What kernels keep between launches is kept per stream."""
    p, q = make(), make()
    q.renew(1)
    expected = [[call(verb, x, backend) for verb in ("draw", "policy, gradient")] for x in (p, q)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = ([], [])
    for _ in range(20):
        for x, stream, found in zip((p, q), streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append([call(verb, x, backend) for verb in ("draw", "policy, gradient")])
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        for one in found:
            for got, right in zip(one, wanted, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(got, right, strict=True))


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


# ---- what the host does ----


@every_backend
@every_verb
def test_in_a_cuda_graph(verb, backend):
    """Captured once, replayed on new values: as the eager call, each time."""
    p = make()
    call(verb, p, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(verb, p, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(verb, p, backend)
    for seed in range(3):
        p.renew(seed)
        graph.replay()
        expected = call(verb, p, backend)
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


@every_backend
@every_verb
def test_no_synchronization(verb, backend):
    p = make()
    call(verb, p, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(verb, p, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend
@every_verb
def test_number_of_launches(verb, backend):
    p = make()
    launches = None
    for _ in range(2):  # the profiler's first run may miss what it is still setting up for
        call(verb, p, backend)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call(verb, p, backend)
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        launches = [e.name for e in profile.events() if e.device_type == on_device]
    if not launches:
        pytest.skip("the profiler sees no kernels on this machine")
    assert len(launches) <= VERBS[verb][1], launches


@every_backend
@pytest.mark.parametrize("verb", [v for v, (_, n) in VERBS.items() if n == 4])
def test_peak_memory_is_the_inputs_and_one_gradient(verb, backend):
    p = make(8, 2**18)
    call(verb, p, backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(verb, p, backend)
    more = torch.cuda.max_memory_allocated() - before
    assert more <= 1.02 * p.v.nbytes + 2**18, f"{more / p.v.nbytes:.3f} of a gradient"


@every_backend
def test_compiles_whole(backend):
    """torch.compile with fullgraph, forward and backward, gives the eager results."""
    p = make(4, 4096)

    def train(v):
        x_next, drawn = fk.sde_step(p.x, v.detach(), p.rows, **p.key, backend=backend)
        log_prob = fk.sde_log_prob(p.x, v * 1.0, x_next, p.rows, backend=backend)
        out = fk.policy_loss(
            v * 1.0, p.x, x_next, p.rows, p.advantage, old_velocity=p.old, backend=backend
        )
        return drawn, log_prob, out.loss

    results = []
    for run in (train, torch.compile(train, fullgraph=True)):
        drawn, log_prob, loss = run(p.v)
        gradients = torch.autograd.grad(log_prob.sum() + loss, p.v)
        results.append((drawn, log_prob.detach(), loss.detach(), *gradients))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
    assert torch.equal(results[0][0], results[0][1])


def test_errors_name_the_device():
    p = make(2, 8)
    with pytest.raises(ValueError, match=f"velocity: expected device {DEVICE}, got cpu"):
        fk.sde_step(p.x, p.v.detach().cpu(), p.rows, **p.key)
    with pytest.raises(ValueError, match=f"c_rows: expected device {DEVICE}, got cpu"):
        fk.sde_step(p.x, p.v.detach(), GRID[0], **p.key)
    with pytest.raises(ValueError, match=f"sample_id: expected device {DEVICE}, got cpu"):
        fk.sde_step(p.x, p.v.detach(), p.rows, **p.key | {"sample_id": torch.arange(2)})
