"""The noise: known answers, the same bits everywhere, no collisions, and a standard normal law."""

import itertools
import math

import numpy
import pytest
import torch

import flowkern as fk
from flowkern.ops._common import native
from flowkern.ops._common.philox import philox_4x32_10


def word(*values):
    return [torch.tensor(v) for v in values]


def test_known_answers():
    """The published vectors of Random123 for philox4x32-10."""
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        assert tuple(int(w) for w in philox_4x32_10(word(*counter), key)) == expected


@pytest.fixture
def every_isa():
    kernels = native.cpu()
    if kernels is None:
        pytest.skip(native.why_not())
    widest = kernels.isa()
    names = ["baseline", "avx2", "avx512"]
    yield [(isa, kernels.use_isa) for isa in names[: names.index(widest) + 1]]
    kernels.use_isa(widest)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, -1])
def test_same_bits_on_every_backend_and_instruction_set(seed, every_isa):
    ids = torch.tensor([0, 7, 2**31, 2**40 + 5, -3])
    step = torch.tensor([0, 1, 2, 2**28 - 1, 5])
    for shape in ((5, 4099), (5, 3, 1), (5, 1024, 3)):
        expected = fk.philox_normal(shape, seed, ids, step, "match", backend="reference")
        for isa, use in every_isa:
            use(isa)
            assert torch.equal(
                fk.philox_normal(shape, seed, ids, step, "match", backend="native"), expected
            )


def test_depends_on_the_key_alone(backend):
    """Not on the batch, its order, or how many elements are asked for (up to the last ones)."""
    ids, step = torch.tensor([5, 9, 11]), torch.tensor([3, 3, 4])
    all_three = fk.philox_normal((3, 10, 30), 42, ids, step, backend=backend)
    shuffled = fk.philox_normal((2, 10, 30), 42, ids[[2, 0]], step[[2, 0]], backend=backend)
    alone = fk.philox_normal((1, 300), 42, ids[1:2], 3, backend=backend)
    shorter = fk.philox_normal((1, 7), 42, ids[1:2], 3, backend=backend)
    assert torch.equal(shuffled, all_three[[2, 0]])
    assert torch.equal(alone, all_three[1:2].flatten(1))
    assert torch.equal(shorter, alone[:, :7])


def test_no_collisions_across_streams_steps_ids_seeds_and_elements(backend):
    """Keys that differ in one field only, at the edges of the fields: no block of four repeats."""
    steps, ids = (0, 1, 2, 2**27, 2**28 - 1), (0, 1, 4, 2**31, 2**32, 2**32 + 1, 2**62, -1)
    seeds, streams = (0, 1, 2**32, 2**63, -1), ("init", "step", "match")
    keys = list(itertools.product(seeds, streams, steps))
    draws = [fk.philox_normal((len(ids), 64), *_key(k, ids), k[1], backend=backend) for k in keys]
    blocks = torch.cat(draws).reshape(-1, 4)
    assert len(blocks) == len(keys) * len(ids) * 16 == 9_600
    assert len(torch.unique(blocks, dim=0)) == len(blocks)


def _key(key, ids):
    seed, _, step = key
    return seed, torch.tensor(ids), step


def test_normals_are_those_of_the_exact_transform():
    """Box-Muller of the same u and angle in float64: within a few last places."""
    block, zero = torch.arange(250_000), torch.zeros(250_000, dtype=torch.int64)
    w = philox_4x32_10((block, zero + (1 << 28 | 7), zero + 5, zero), 99)
    u = (w[0] >> 1).float() * 2.0**-31 + 2.0**-32
    radius = torch.sqrt(-2 * torch.log(u.double()))
    angle = 2 * math.pi * (w[1].double() / 2**32)
    exact = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)])
    got = fk.philox_normal((1, 1_000_000), 99, torch.tensor([5]), 7).reshape(-1, 4).T[:2]
    # Relative to the radius: near the axes the error is that of the angle, not of the value.
    assert ((got - exact).abs() / radius.clamp(min=1e-9)).max() < 4e-7


def test_streams_and_neighbors_are_uncorrelated():
    ids = torch.arange(4)
    runs = [
        fk.philox_normal((4, 250_000), seed, ids + shift, step, stream).flatten()
        for seed, shift, step, stream in [
            (0, 0, 0, "step"), (1, 0, 0, "step"), (0, 4, 0, "step"), (0, 0, 1, "step"),
            (0, 0, 0, "init"), (0, 0, 0, "match"),
        ]
    ]  # fmt: skip
    pairs = [(runs[0], other) for other in runs[1:]]
    pairs += [(runs[0][lag:], runs[0][:-lag]) for lag in (1, 2, 3, 4, 8)]
    for x, y in pairs:
        assert abs(float((x * y).mean())) < 5 / math.sqrt(len(x))


def test_standard_normal():
    """Moments, tails and the Kolmogorov-Smirnov distance at 10^7 draws, each within five standard
    errors.
    """
    n = 10_000_000
    x = fk.philox_normal((10, n // 10), 2026, torch.arange(10), 1).flatten()
    z = x.double()
    power = torch.ones_like(z)
    for moment, variance in ((0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10_170)):
        assert abs(float(power.mul_(z).mean()) - moment) < 5 * math.sqrt(variance / n)
    for threshold in (3.0, 4.0, 5.0):
        tail = math.erfc(threshold / math.sqrt(2))
        found = int((x.abs() > threshold).count_nonzero()) / n
        assert abs(found - tail) < 5 * math.sqrt(tail / n), threshold
    ordered = torch.special.ndtr(torch.from_numpy(numpy.sort(x.numpy())).double())
    grid = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((ordered - grid).max(), (grid + 1 / n - ordered).max())
    # Exceeded once in a thousand seeds; this seed is fixed.
    assert float(distance) < 1.95 / math.sqrt(n)


def test_errors():
    ids = torch.arange(2)
    with pytest.raises(ValueError, match="stream: expected one of"):
        fk.philox_normal((2, 4), 0, ids, 0, "other")
    with pytest.raises(ValueError, match="step: expected 0 <= step"):
        fk.philox_normal((2, 4), 0, ids, 2**28)
    with pytest.raises(ValueError, match=r"sample_id: expected shape \(3,\), got \(2,\)"):
        fk.philox_normal((3, 4), 0, ids, 0)
    with pytest.raises(TypeError, match="sample_id: expected int64, got torch.float32"):
        fk.philox_normal((2, 4), 0, ids.float(), 0)
    with pytest.raises(ValueError, match="seed: expected an integer of 64 bits"):
        fk.philox_normal((2, 4), 2**64, ids, 0)
    with pytest.raises(ValueError, match="shape: expected"):
        fk.philox_normal((2,), 0, ids, 0)
    assert fk.philox_normal((0, 4), 0, ids[:0], 0).shape == (0, 4)
