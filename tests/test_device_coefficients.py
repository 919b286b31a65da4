"""Edges made on the device: those of edge_coefficients, without a look at a value."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern as fk
from flowkern.schedules import (
    KINDS,
    Coefficients,
    device_coefficients,
    edge_coefficients,
    sd3_sigmas,
    step_coefficients,
)

LEVEL = {"cps": 0.8, "dance_sde": 0.3}
every_kind = pytest.mark.parametrize("kind", KINDS)


def edges(count=16, seed=0, dtype=torch.float32):
    """Random ones, and those at which formulas break: from 1, from near 1 on both sides, to 0."""
    draw = torch.Generator().manual_seed(seed)
    s = torch.rand(count, generator=draw, dtype=torch.float64).clamp(1e-3)
    n = s * torch.rand(count, generator=draw, dtype=torch.float64) * 0.98
    s[:4] = torch.tensor([1.0, 1 - 9e-6, 1 - 2e-5, 1 + 5e-7])
    n[3:6] = 0.0
    return s.to(dtype), n.to(dtype)


def one_by_one(s, n, kind, level, second):
    """edge_coefficients of each, on the numbers alone."""
    per_edge = [
        [None] * len(s)
        if x is None
        else torch.as_tensor(x, dtype=torch.float64).expand(len(s)).tolist()
        for x in (level, second)
    ]
    numbers = zip(s.tolist(), n.tolist(), *per_edge, strict=True)
    return torch.stack([edge_coefficients(a, b, kind, *rest).table for a, b, *rest in numbers])


def near(got, expected):
    """To float32's rounding: sine and cosine of tensors are not those of numbers."""
    torch.testing.assert_close(got, expected.float(), rtol=2**-23, atol=0)


@every_kind
def test_they_are_those_of_edge_coefficients(kind):
    s, n = edges()
    level = LEVEL.get(kind, 0.7)
    for second in (None, 0.95):
        got = device_coefficients(s, n, kind, level, second).table
        assert got.dtype == torch.float32
        assert torch.equal(got, edge_coefficients(s, n, kind, level, second).table.float())
    levels = torch.rand(len(s), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seconds = 0.5 + levels / 2.1
    for levels_ in (levels, levels[:1], levels[0], level):
        for second in (seconds, seconds[:1], seconds[0], None):
            got = device_coefficients(s, n, kind, levels_, second)
            near(got.table, one_by_one(s, n, kind, levels_, second))
            assert len(got) == len(s)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_taken_as_they_are(kind, dtype):
    s, n = edges(dtype=dtype, seed=2)
    s, n = s[n < s], n[n < s]
    levels = torch.full_like(s, 0.7)
    near(device_coefficients(s, n, kind, levels).table, one_by_one(s, n, kind, levels, None))


@every_kind
def test_one_value_of_each_is_one_edge_and_each_may_have_its_own_size(kind):
    s, n = edges(seed=3)
    alone = edge_coefficients(float(s[2]), float(n[2]), kind, 0.6)
    one, many = (s[2:3], s[2]), torch.full((3,), 0.6, dtype=torch.float64)
    for first in one:
        for level in (0.6, many[:1], many[0]):
            near(device_coefficients(first, n[2], kind, level).table, alone.table)
        spread = device_coefficients(first, n[2:3], kind, many).table
        near(spread, alone.table.expand(3, -1))
    falling = torch.tensor([0.5, 0.1, 0.0])
    first = torch.full((3,), 0.9)
    near(
        device_coefficients(first[0], falling, kind, 0.6).table,
        one_by_one(first, falling, kind, 0.6, None),
    )
    beginnings = torch.tensor([1.0, 0.8, 0.5])  # an end for all of them
    for end in (falling[1:2], falling[1]):
        shared = device_coefficients(beginnings, end, kind, 0.6).table
        near(shared, one_by_one(beginnings, falling[1:2].expand(3), kind, 0.6, None))
    seconds = torch.tensor([0.9, 0.8, 0.7])  # of their own alone, whether a kind asks for them
    assert len(device_coefficients(first[0], falling[1], kind, 0.6, seconds)) == 3
    assert device_coefficients(s[:0], n[:0], kind, 0.7).table.shape == (0, 9)


def test_a_grid_is_a_look_up_away():
    """As a drop-in asks: sigmas[index], sigmas[index + 1], the grid's second value."""
    grid, index = sd3_sigmas(10), torch.tensor([0, 3, 8])
    x, v, noise = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    c = device_coefficients(grid[index], grid[index + 1], "flow_sde", 0.7, grid[1])
    expected = step_coefficients(grid, "flow_sde", 0.7)[index].to(dtype=torch.float32)
    assert torch.equal(c.table, expected.table)
    for got, wanted in zip(
        fk.sde_step(x, v, c, noise=noise), fk.sde_step(x, v, expected, noise=noise), strict=True
    ):
        assert torch.equal(got, wanted)
    c = device_coefficients(grid[:1], grid[1:2], "flow_sde", 0.7)  # one for all samples
    assert fk.sde_step(x, v, c, noise=noise)[1].shape == (3,)


class NoLook(TorchDispatchMode):
    """What hands a value to the host raises."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"), name
        return function(*args, **(kwargs or {}))


@every_kind
def test_no_value_is_read(kind):
    s, n = edges()
    for size in (len(s), 1):
        wanted = device_coefficients(s[:size], n[:size], kind, s[:size], n[0])
        with NoLook():
            got = device_coefficients(s[:size], n[:size], kind, s[:size], n[0])
            changed = got.tempered(), got.without_normalizer()
        assert torch.equal(got.table, wanted.table)
        assert torch.equal(changed[0].table, wanted.tempered().table)
        with FakeTensorMode():
            made = device_coefficients(torch.empty(size), torch.empty(size), kind, 0.7)
            assert made.table.shape == wanted.table.shape
            on_device = [torch.empty(size, device="meta") for _ in range(2)]
            assert device_coefficients(*on_device, kind, 0.7).without_normalizer().table.is_meta
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoLook():
        float(s[0])


def test_under_a_compiler():
    """One graph of all kinds, and of a number of edges that it does not know."""

    def both(s, n, level):
        made = [device_coefficients(s, n, kind, level) for kind in KINDS]
        return torch.stack(
            [made[0].without_normalizer().table, *(c.tempered().table for c in made)]
        )

    compiled = torch.compile(both, fullgraph=True, backend="eager", dynamic=True)
    for count in (16, 5):
        s, n = edges(count)
        level = torch.full((count,), 0.7)
        assert torch.equal(compiled(s, n, level), both(s, n, level))


def test_no_gradient_comes_of_it():
    s, n = edges(5)
    assert not device_coefficients(s.requires_grad_(), n, "flow_sde", 0.7).table.requires_grad


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s, n: (0.9, n, "ode", 0), TypeError, "sigma: expected a tensor, got float"),
        (lambda s, n: (s, 0.1, "ode", 0), TypeError, "sigma_next: expected a tensor as sigma is"),
        (lambda s, n: (s, n, "euler", 0), ValueError, "kind: expected one of"),
        (lambda s, n: (s, n, "cps", 3), ValueError, r"noise_level: cps takes an angle in \[0, 2\]"),
        (lambda s, n: (s, n, "flow_sde", -1), ValueError, "noise_level: expected a finite number"),
        (lambda s, n: (s, n, "ode", 0, 1), ValueError, r"sigma_max: expected a number in \[0, 1\)"),
        (lambda s, n: (s, n[:3], "ode", 0), ValueError, r"sigma_next: expected shape .*\(5,\)"),
        (lambda s, n: (s.long(), n, "ode", 0), ValueError, "sigma: .*got torch.int64"),
        (lambda s, n: (s, n.to_sparse(), "ode", 0), ValueError, "sigma_next: .*torch.sparse_coo"),
        (lambda s, n: (s[None], n, "ode", 0), ValueError, r"sigma: .*of shape \(1, 5\)"),
        (lambda s, n: (s, n.to("meta"), "ode", 0), ValueError, "sigma_next: .*cpu, got meta"),
        (lambda s, n: (s, n, "ode", n.to("meta")), ValueError, "noise_level: .*cpu, got meta"),
    ],
)
def test_what_the_host_can_see_is_checked(call, error, message):
    with pytest.raises(error, match=message):
        device_coefficients(*call(*edges(5)))


def test_a_table_that_is_not_strided_is_refused():
    with pytest.raises(TypeError, match="table: .*got torch.sparse_coo"):
        Coefficients(torch.ones(2, 9).to_sparse())


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_edges_of_a_rollout_in_inference_mode_serve_training(backend):
    """However they were made: on the device, of a grid, some of it, or without the normalizer."""
    if why_not := fk.backends("cpu")[backend]:
        pytest.skip(why_not)
    grid = sd3_sigmas(6)
    x, v, x_next = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = step_coefficients(grid, "flow_sde", 0.7)
        some = whole[torch.tensor([1, 2])]
        own = Coefficients(some.table.float() * 1)
        s, n = grid[1:3].float(), grid[2:4].float()
        device = device_coefficients(s, n, "flow_sde", 0.7, grid[1])
        made = [whole[1], some, own, device, device.tempered(), own.without_normalizer()]
        made.append(fk.schedules.multistep_coefficients([0.9, 0.4], 1, sde=True))
    for c in made:
        fk.sde_log_prob(x, v.requires_grad_(), x_next, c, backend=backend).sum().backward()


@pytest.mark.parametrize("name", ["sigma", "sigma_next", "noise_level", "sigma_max"])
def test_numbers_on_a_device_are_not_waited_for_unasked(name):
    arguments = {"sigma": 0.9, "sigma_next": 0.5, "noise_level": 0.7, "sigma_max": 0.9}
    elsewhere = torch.tensor(arguments[name]).to("meta")
    for value in (elsewhere, [elsewhere]):
        if isinstance(value, list) and name in ("noise_level", "sigma_max"):
            continue
        said = f"{name}: expected numbers, or a tensor on the CPU, got one on meta; device_coeff"
        with pytest.raises(ValueError, match=said):
            edge_coefficients(kind="flow_sde", **arguments | {name: value})
    with pytest.raises(ValueError, match=r"sigmas: .* got one on meta; .*\.cpu\(\) waits"):
        step_coefficients(torch.empty(3, device="meta"), "ode", 0)


def test_rows_without_the_normalizer_and_tempered():
    """k and c alone change, of as many edges as there are, history and all."""
    c = step_coefficients(sd3_sigmas(6), "flow_sde", 0.7)
    for some in (c, c[2], fk.schedules.multistep_coefficients([0.9, 0.7, 0.4], 2, sde=True)):
        bare, tempered, before = (
            some.without_normalizer(),
            some.tempered(),
            some.table.clone(),
        )
        assert isinstance(bare, Coefficients) and bare.num_history == some.num_history
        assert torch.equal(bare.k, some.k) and not bare.c.any() and some.c.any()
        assert (tempered.k == 1).all() and not tempered.c.any()
        for changed in (bare, tempered):
            others = [0, 1, 2, 5, 6, 7, 8]
            assert torch.equal(changed.table[..., others], some.table[..., others])
        assert torch.equal(some.table, before)
    kept = step_coefficients(sd3_sigmas(6), "cps", 0.7)
    assert torch.equal(kept.tempered().table, kept.table)
