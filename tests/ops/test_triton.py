"""The Triton kernels against the reference, and the laws of the numerical contract.

On a GPU, or in Triton's interpreter (TRITON_INTERPRET=1 before the first import of triton), where
test_triton_interpreted.py runs this file.
"""

import itertools

import interpreter
import pytest
import torch
from interpreter import DEVICE, INTERPRETED

import flowkern as fk
from flowkern.schedules import (
    KINDS,
    Coefficients,
    device,
    multistep_coefficients,
    sd3_sigmas,
    step_coefficients,
)

pytestmark = pytest.mark.gpu
interpreter.require()

import fused  # noqa: E402

from flowkern.schedules import triton_impl  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRID = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7).to(DEVICE, torch.float32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks per sample at small sizes, for the interpreter; a GPU runs what users run."""
    if INTERPRETED:
        from flowkern.ops._common import rows_triton

        monkeypatch.setattr(rows_triton, "tile", lambda *_: (256, 1))


def latent(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def problem(*shape, dtype=torch.float32, uncond=False, history=0):
    """Arguments of a step as keywords, with one row per sample."""
    arguments = {
        "x_t": latent(*shape, dtype=dtype, seed=1),
        "velocity": latent(*shape, dtype=dtype, seed=2),
        "c_rows": GRID[torch.arange(shape[0], device=DEVICE) % 9],
    }
    if uncond:
        arguments |= {"velocity_uncond": latent(*shape, dtype=dtype, seed=3), "guidance_scale": 4.5}
    if history:
        arguments["history"] = [latent(*shape, dtype=dtype, seed=4 + j) for j in range(history)]
    return arguments


def key(batch, seed=3):
    return {"seed": seed, "sample_id": torch.arange(batch, device=DEVICE) * 977 + 5, "step": 4}


def both(verb, *arguments, **keywords):
    """The result by Triton and by the reference."""
    return [verb(*arguments, **keywords, backend=b) for b in ("triton", "reference")]


def same_rounding(got, expected):
    """Equal; the interpreter alone cuts to bfloat16 where hardware rounds: one last place off."""
    if INTERPRETED and got.dtype == torch.bfloat16:
        return torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=0)
    return torch.equal(got, expected)


@fused.needs_fma(DEVICE)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 + 12345])
def test_noise_has_the_bits_of_the_reference(seed):
    ids = torch.tensor([0, 7, 2**31, 2**40 + 5, -3], device=DEVICE)
    steps = torch.tensor([0, 1, 2, 2**28 - 1, 5], device=DEVICE)
    more_than_a_tile = 259 if INTERPRETED else 1027
    for shape, step in (((5, more_than_a_tile), steps), ((5, 3, 1), 0), ((5, 1), 2**28 - 1)):
        got, expected = both(fk.philox_normal, shape, seed, ids, step, "match")
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


DTYPE_PAIRS = list(itertools.product(DTYPES, repeat=2))
if INTERPRETED:  # each type read and each written, with another one and with itself
    DTYPE_PAIRS = [pair for turn, pair in enumerate(DTYPE_PAIRS) if turn in (0, 1, 4, 5, 6, 8)]


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_draw_rounds_as_the_reference(dtypes):
    """Noise given or keyed, guidance, history; a size of one, of a tile, of a tile and a bit."""
    dtype, out_dtype = dtypes
    shapes = (
        ((3, 1), False, 0),
        ((2, 4, 64), True, 0),
        ((2, 7, 11, 7), False, 3),
        ((2, 300), True, 1),
    )
    for shape, uncond, history in shapes if dtype == out_dtype or not INTERPRETED else shapes[::2]:
        arguments = problem(*shape, dtype=dtype, uncond=uncond, history=history)
        arguments["out_dtype"] = out_dtype
        noise = fk.philox_normal(shape, **key(shape[0]), backend="triton")
        keyed, _ = both(fk.sde_step, **arguments, **key(shape[0]))
        given, expected = both(fk.sde_step, **arguments, noise=noise)
        assert torch.equal(given[0], keyed[0]) and torch.equal(given[1], keyed[1])
        assert given[0].dtype == out_dtype and same_rounding(given[0], expected[0])
        for name in ("x_t", "velocity", "noise"):  # in place
            whole = arguments | {"noise": noise}
            out = whole[name].clone()
            if out.dtype == out_dtype:
                got = fk.sde_step(**whole | {name: out}, out=out, backend="triton")
                assert torch.equal(out, given[0]) and torch.equal(got[1], given[1]), name
        if not history:  # a replay has none: the truth is the float64 replay of what was stored
            wide = {k: v.double() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
            wide |= {k: arguments[k] for k in ("c_rows", "guidance_scale") if k in arguments}
            for_stored = [fk.sde_log_prob(**wide, x_next=x.double()) for x, _ in (given, expected)]
            error, allowed = (
                float((log_prob - true).abs().max())
                for (_, log_prob), true in zip((given, expected), for_stored, strict=True)
            )
            assert error <= max(2 * allowed, 5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replayed_ratio_is_exactly_one_for_any_split(dtype):
    """Also for a sample stored in another dtype, where a kernel lays out its threads otherwise."""
    # Interpreted, threads lie nowhere: another dtype stands for both.
    stored = (dtype, DTYPES[DTYPES.index(dtype) - 1]) if INTERPRETED else DTYPES
    for out_dtype, size in itertools.product(stored, (520, 1)):
        arguments = problem(3, size, dtype=dtype, uncond=True)
        x_next, drawn = fk.sde_step(**arguments, **key(3), out_dtype=out_dtype, backend="triton")
        tensors = [n for n, v in arguments.items() if n != "guidance_scale"]
        for split in ([3], [1, 2]):
            for index in torch.tensor([2, 0, 1], device=DEVICE).split(split):
                part = arguments | {n: arguments[n][index] for n in tensors}
                replayed = fk.sde_log_prob(**part, x_next=x_next[index], backend="triton")
                assert torch.equal(replayed, drawn[index])


def test_the_tile_does_not_show(monkeypatch):
    """Kernels may take different tiles: a draw, its replay, and a loss that replays it."""
    if not INTERPRETED:
        pytest.skip("a GPU takes its tiles by dtype and size")
    from flowkern.ops._common import rows_triton

    arguments, found = problem(2, 9001), []
    for block in (1024, 2048, 2**16):
        monkeypatch.setattr(rows_triton, "tile", lambda *_, block=block: (block, 1))
        x_next, drawn = fk.sde_step(**arguments, **key(2), backend="triton")
        replayed = fk.sde_log_prob(**arguments, x_next=x_next, backend="triton")
        loss = fk.policy_loss(
            **arguments, x_next=x_next, advantage=drawn, old_log_prob=drawn, backend="triton"
        )
        assert torch.equal(replayed, drawn) and (loss.ratio == 1).all()
        old = arguments["x_t"]
        off = fk.policy_loss(
            **arguments, x_next=x_next, advantage=drawn, old_velocity=old, backend="triton"
        )
        found.append([x_next, drawn, *loss, *off])
    assert all(
        torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True)
    )


@pytest.mark.skipif(INTERPRETED, reason="where samples are long tiles are a GPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2**18, 2**18 + 8])
def test_long_samples(size, dtype):
    """Around the size from which on a draw and its replay take larger tiles. Interpreted, they are
    of the test's choice, and test_the_tile_does_not_show says it.
    """
    arguments = problem(2, size, dtype=dtype)
    for out_dtype in (torch.float32, torch.bfloat16):
        drawn = fk.sde_step(**arguments, **key(2), out_dtype=out_dtype, backend="triton")
        expected = fk.sde_log_prob(**arguments, x_next=drawn[0], backend="reference")
        torch.testing.assert_close(drawn[1], expected, rtol=1e-5, atol=1e-6)
        replayed = fk.sde_log_prob(**arguments, x_next=drawn[0], backend="triton")
        assert torch.equal(replayed, drawn[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype):
    for shape, uncond in (((3, 777), True), ((2, 256), False), ((3, 1), True)):
        arguments = problem(*shape, dtype=dtype, uncond=uncond)
        x_next = latent(*shape, seed=9)
        weight = torch.linspace(-1, 2, shape[0], device=DEVICE)
        gradients = []
        for backend, to in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
            velocity = arguments["velocity"].clone().to(to).requires_grad_()
            log_prob = fk.sde_log_prob(
                **arguments | {"velocity": velocity}, x_next=x_next, backend=backend
            )
            (log_prob * weight).sum().backward()
            gradients.append(velocity.grad)
        got, plain, true = (g.double() for g in gradients)
        assert gradients[0].dtype == dtype
        floor = torch.finfo(dtype).eps * true.abs().max()
        assert (got - true).abs().max() <= max(2 * (plain - true).abs().max(), floor)
        assert true.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_and_the_gradient_of_both(dtype):
    """Of a draw and its replay, x_next rounded first; of log_prob, of the mean, of both."""
    for shape, uncond, history in (((3, 777), True, 0), ((2, 256), False, 3), ((3, 1), True, 0)):
        arguments = problem(*shape, dtype=dtype, uncond=uncond, history=history)
        weights = torch.linspace(-1, 2, shape[0], device=DEVICE), latent(*shape, seed=8) / shape[1]
        found = []
        for backend in ("triton", "reference"):
            velocity = arguments["velocity"].clone().requires_grad_()
            options = {"return_mean": True, "backend": backend}
            given = arguments | {"velocity": velocity} | options
            x_next, log_prob, mean = fk.sde_step(
                **given, noise=latent(*shape, seed=9), out_dtype=torch.float32,
                round_dtype=torch.float16,
            )  # fmt: skip
            results = [x_next, mean, log_prob]
            pairs = [(log_prob, mean)]
            if not history:
                pairs.append(fk.sde_log_prob(**given, x_next=x_next))
                assert torch.equal(pairs[1][0], log_prob) and torch.equal(pairs[1][1], mean)
            gradients = [
                torch.autograd.grad(
                    [pair[j] for j in which], velocity, [weights[j] for j in which],
                    retain_graph=True,
                )[0]
                for pair in pairs
                for which in ((0,), (1,), (0, 1))
            ]  # fmt: skip
            found.append((results, gradients))
        (got, gradients), (expected, wanted) = found
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert torch.equal(got[0], got[0].half().float())
        torch.testing.assert_close(got[2], expected[2], rtol=1e-6, atol=1e-6)
        for have, want in zip(gradients, wanted, strict=True):
            close = torch.finfo(dtype).eps * (2 if INTERPRETED else 1)
            atol = close * float(want.abs().max())
            assert have.dtype == dtype and want.abs().max() > 0
            torch.testing.assert_close(have, want, rtol=close, atol=atol)


def test_std_zero_reads_no_noise():
    """The deterministic rows of a mixed batch are Euler steps bit for bit, whatever the noise."""
    table = GRID.table[:3].clone()
    table[1] = step_coefficients(sd3_sigmas(10), "ode", 0.0).table[4].to(table)
    arguments = problem(3, 300) | {"c_rows": Coefficients(table)}
    arguments["x_t"][1, :9] = -0.0
    arguments["velocity"][1, :9] = 0.0  # dt * 0 = -0: adding 0 * noise would lose the sign
    noise = latent(3, 300, seed=8)
    noise[1] = float("nan")
    euler = arguments["x_t"][1] + table[1, 1] * arguments["velocity"][1]
    for source in ({"noise": noise}, key(3)):
        x_next, log_prob = fk.sde_step(**arguments, **source, backend="triton")
        assert torch.equal(x_next[1].view(torch.int32), euler.view(torch.int32))
        assert log_prob[1] == 0 and torch.isfinite(x_next).all() and torch.isfinite(log_prob).all()
        assert not torch.equal(x_next[0], arguments["x_t"][0])


def test_single_edge_is_the_same_row_for_all():
    arguments = problem(3, 300)
    row = torch.full((3,), 4, device=DEVICE)
    edge, rows = (
        fk.sde_step(**arguments | {"c_rows": c}, **key(3), backend="triton")
        for c in (GRID[4], GRID[row])
    )
    assert torch.equal(edge[0], rows[0]) and torch.equal(edge[1], rows[1])


def test_any_strides():
    x_t = latent(3, 20, 15).transpose(1, 2)
    velocity = latent(3, 2, 15, 20, seed=1)[:, 1]  # samples apart, each contiguous
    noise = latent(1, 15, 20, seed=2).expand(3, 15, 20)
    rows = GRID[torch.arange(3, device=DEVICE)]
    got, expected = both(fk.sde_step, x_t, velocity, rows, noise=noise)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(fk.sde_log_prob(x_t, velocity, got[0], rows, backend="triton"), got[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ode_step_with_history_and_x0(dtype):
    for order in (1, 2, 3):
        arguments = problem(3, 300, dtype=dtype, history=order - 1)
        rows = multistep_coefficients((0.9, 0.8, 0.7, 0.6), order).to(DEVICE, torch.float32)
        got, expected = both(
            fk.ode_step, arguments["x_t"], arguments["velocity"], rows,
            history=arguments.get("history", ()), return_x0=True,
        )  # fmt: skip
        assert all(same_rounding(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0)])
def test_nothing_to_do(shape):
    arguments = problem(*shape)
    (x_next, log_prob), (_, expected) = both(fk.sde_step, **arguments, **key(shape[0]))
    assert x_next.shape == shape and torch.equal(log_prob, expected)
    velocity = arguments.pop("velocity").requires_grad_()
    replayed = fk.sde_log_prob(velocity=velocity, x_next=x_next, **arguments, backend="triton")
    assert torch.equal(replayed, expected)
    replayed.sum().backward()
    assert velocity.grad.shape == shape


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_in_a_cuda_graph():
    """Captured once, run on new values: as the eager call, each time."""
    arguments = problem(3, 70_000)
    fk.sde_step(**arguments, **key(3), backend="triton")  # compiled before the capture
    k = key(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_next, log_prob = fk.sde_step(**arguments, **k, backend="triton")
    for seed in range(3):
        arguments["x_t"].copy_(latent(3, 70_000, seed=seed))
        graph.replay()
        expected = fk.sde_step(**arguments, **k, backend="triton")
        assert torch.equal(x_next, expected[0]) and torch.equal(log_prob, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_keep_their_length(dtype):
    """As the reference, with both gradients; tokens of several tiles, and parts of one."""
    for shape, patch in (((16, 4, 6), (2, 2)), ((3, 2, 6, 10), (3, 5)), ((2500,), (1, 1))):
        halves = [latent(2, *shape, dtype=dtype, seed=i).requires_grad_() for i in (1, 2)]
        got, expected = both(fk.rescaled_guidance, *halves, 4.0, patch)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        weight = latent(2, *shape, seed=3)
        gradients = [torch.autograd.grad(out, halves, weight) for out in (got, expected)]
        near = (
            {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        )
        torch.testing.assert_close(*gradients, **near)
        alone = fk.rescaled_guidance(*(x[1:] for x in halves), 4.0, patch, "triton")
        assert torch.equal(alone, got[1:])
    nothing = torch.zeros(1, 4, 2, 2, device=DEVICE)
    for result in both(fk.rescaled_guidance, nothing, nothing, 4.0, (2, 2)):
        assert result.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_those_of_the_formulas(kind):
    """The second writing of `schedules.formulas`: more than a tile of edges, and where they break;
    levels that are numbers, one for all, one for each; sigmas in other dtypes and strides.
    """
    s = torch.rand(2, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = s * 0.9 * s.flip(0)
    s[:, :3] = torch.tensor([1.0, 1 - 9e-6, 1 - 2e-5], dtype=torch.float64)
    n[:, 2:4] = 0.0
    s, n = s.to(DEVICE), n.to(DEVICE)
    each = s[1].clamp(0.01, 0.99)
    for sigma, level, second in (
        (s[0], 0.7, None), (s.T[:, 0], each, 0.95), (s[0].float(), each[:1].float(), each.float()),
        (s[0].bfloat16(), torch.tensor(0.3, device=DEVICE), each[5]),
    ):  # fmt: skip
        arguments = kind, len(sigma), sigma, n[0], level, second
        got, expected = triton_impl.rows(*arguments), device._rows(*arguments)
        torch.testing.assert_close(got, expected, rtol=2**-23, atol=0)
    one = kind, 1, s[0, 4:5], n[0, 4], 0.7, each[5]
    torch.testing.assert_close(triton_impl.rows(*one), device._rows(*one), rtol=2**-23, atol=0)
    assert triton_impl.rows(kind, 0, s[0, :0], n[0, :0], 0.7, None).shape == (0, 9)
