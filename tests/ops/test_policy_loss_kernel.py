"""The contract of the policy-loss kernels (docs/numerics.md): how close, what is read, which
bits.
"""

import pytest
import torch
from test_policy_loss import double, problem

import flowkern as fk
from flowkern.ops.policy_loss import native_impl
from flowkern.ops.policy_loss.api import LOSS
from flowkern.ops.policy_loss.inputs import PolicyInputs
from flowkern.schedules import edge_coefficients, sd3_sigmas, step_coefficients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One element; packed tokens; neither a multiple of the chunk, nor of four; more than a segment.
SHAPES = ((1,), (3, 8), (65, 64), (2, 3, 1001), (16_385,))
WIDE = {"clip_low": 0.99, "clip_high": 9.0}  # nothing is clipped

pytestmark = pytest.mark.skipif(
    fk.backends()["native"] is not None, reason="the native kernels are not built"
)


def leaf(p):
    return p | {"velocity": p["velocity"].detach().clone().requires_grad_()}


def evaluate(p, backend="native", grad=None, **options):
    """All outputs and the gradient of a call, of fresh velocities."""
    p = leaf(p)
    out = fk.policy_loss(**p, **options, backend=backend)
    grad = torch.ones_like(out.loss) if grad is None else grad
    return [*out, *torch.autograd.grad(out.loss, p["velocity"], grad)]


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# ---- against the truth ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_no_bias(dtype):
    """Over many seeds the error has no sign, and the direction is that of the truth."""
    bias, cosine = [], []
    for seed in range(40):
        p, _ = problem(4, (257,), dtype=dtype, drift=0.3, seed=seed)
        got, true = (
            evaluate(q, b, **WIDE)[-1].double()
            for q, b in ((p, "native"), (double(p), "reference"))
        )
        bias.append((got - true).mean() / true.square().mean().sqrt())
        cosine.append(torch.nn.functional.cosine_similarity(got.flatten(), true.flatten(), 0))
    bias, resolution = torch.stack(bias), torch.finfo(dtype).eps
    # The mean of 40 x 1,028 roundings, each within half a step of its value: five deviations.
    assert abs(bias.mean()) < 5 * resolution / 2 / (40 * 1028) ** 0.5
    assert 1 - torch.stack(cosine).min() < max(resolution**2, 1e-12)


def test_edges_without_noise_and_the_first_one():
    """sigma == 1, std == 0 and CPS, whose last edge keeps its k."""
    grid = sd3_sigmas(10)
    edges = {
        "first": step_coefficients(grid, "flow_sde", 0.7)[0],
        "ode": step_coefficients(grid, "ode", 0.0)[4],
        "cps": step_coefficients(grid, "cps", 0.7)[4],
        "cps, last": step_coefficients(grid, "cps", 0.7)[9],
        "single": edge_coefficients(0.8, 0.3, "dance_sde", 0.4),
    }
    for name, edge in edges.items():
        p, _ = problem(4, (130,), dtype=torch.float32, drift=0.3)
        p["c_rows"] = edge
        key = {"seed": 5, "sample_id": torch.arange(4), "step": 7}
        for change in ({}, {"ratio": "guard"}, {"x_next": None, **key}):
            change |= {"velocity_ref": p["x_t"], "kl_coef": 0.1}
            got, plain = (evaluate(p | change, b, **WIDE) for b in ("native", "reference"))
            for x, y in zip(got, plain, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)
        if edge.std == 0:
            got = evaluate(p | {"velocity_ref": p["x_t"], "kl_coef": 0.1}, ratio="guard")
            assert (got[1] == 0).all() and (got[3] == 0).all() and (got[-1] == 0).all()


# ---- siblings, strides ----


@pytest.mark.parametrize("siblings", [1, 2, 5, 64])
def test_siblings_in_any_order(siblings, poisoned_empty):
    """Rows serve up to 64 samples, each with an edge of its own; a row without samples gets 0."""
    g = torch.Generator().manual_seed(siblings)
    row = torch.cat([torch.arange(3).repeat(siblings), torch.tensor([5])])
    row = row[torch.randperm(len(row), generator=g)]
    p, _ = problem(max(6, len(row)), (1027,), dtype=torch.float32, drift=0.3)
    p |= {n: p[n][: len(row)] for n in ("x_next", "advantage", "c_rows")}
    for name in ("velocity", "x_t", "old_velocity"):
        p[name] = p[name].detach()[:6]
    p |= {"row": row, "velocity_ref": p["x_t"], "kl_coef": torch.rand(len(row), generator=g)}
    p["x_next"] = p["x_t"][row] + 0.3 * p["x_next"]
    for ratio in ("sde", "guard"):
        got = evaluate(p, ratio=ratio, **WIDE)
        true = evaluate(double(p), "reference", ratio=ratio, **WIDE)
        for x, y in zip(got, true, strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=2e-4, atol=1e-6)
        assert (got[-1][3:5] == 0).all() and (got[-1][5] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_mixed_dtypes(dtype):
    p, _ = problem(6, (7, 130), dtype=torch.float32, drift=0.3)
    names = ("velocity", "x_t", "x_next", "old_velocity")
    p |= {n: p[n].detach().to(dtype) for n in names}
    plain = evaluate(p, **WIDE)
    padded = p | {n: torch.nn.functional.pad(p[n], (0, 0, 0, 5))[:, :7] for n in names}
    transposed = p | {n: p[n].mT.contiguous().mT for n in names}
    assert same(evaluate(padded, **WIDE), plain) and same(evaluate(transposed, **WIDE), plain)
    mixed = p | {n: p[n].float() for n in ("x_t", "old_velocity")}
    assert same(evaluate(mixed, **WIDE), plain) and plain[-1].dtype == dtype


# ---- what is read ----


def test_clipped_samples_are_not_read_backward():
    """NaN poisons x_next of clipped samples between forward and backward."""
    p, _ = problem(12, (1500,), dtype=torch.float32, drift=0.4)
    p = leaf(p)
    out = fk.policy_loss(**p, clip_low=1e-4, clip_high=1e-4, backend="native")
    clipped = out.clipped_low | out.clipped_high
    assert clipped.any() and not clipped.all()
    p["x_next"].data[clipped] = torch.nan  # .data: autograd does not notice
    p["x_t"].data[clipped] = torch.nan
    out.loss.backward()
    gradient = p["velocity"].grad
    assert (gradient[clipped] == 0).all() and (gradient[~clipped] != 0).any(1).all()
    assert gradient.isfinite().all()


def test_only_what_a_path_needs_is_read():
    p, _ = problem(4, (100,), dtype=torch.float32)
    unread = torch.full_like(p["x_next"], torch.nan)
    on_policy = p | {"old_velocity": None}
    with torch.no_grad():
        out = fk.policy_loss(**on_policy | {"x_next": unread}, backend="native")
    assert (out.log_ratio == 0).all() and out.loss.isfinite()

    p = leaf(p) | {"velocity_ref": p["x_t"].clone(), "kl_coef": 0.0}
    out = fk.policy_loss(**p, backend="native")
    for name in (
        "old_velocity",
        "velocity_ref",
    ):  # no use to the gradient of an sde ratio without KL
        p[name].data.fill_(torch.nan)
    out.loss.backward()
    assert p["velocity"].grad.isfinite().all()


def test_saves_inputs_and_slopes_alone():
    p, _ = problem(5, (999,), dtype=torch.float32)
    p = leaf(p) | {"velocity_ref": p["x_t"].clone(), "kl_coef": 0.1}
    inputs = {x.data_ptr() for x in p.values() if isinstance(x, torch.Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fk.policy_loss(**p, backend="native")
    assert all(x.data_ptr() in inputs or x.shape in ((5, 2), (5, 9)) for x in saved)
    loss = fk.policy_loss(**p, backend="native").loss
    with torch.no_grad():
        p["x_next"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- bits ----


def test_recorded_log_prob_of_the_same_velocity_gives_ratio_one():
    for dtype in DTYPES:
        p, _ = problem(5, (20_000,), dtype=dtype, drift=0.0)
        velocity = p["velocity"].detach()
        recorded = fk.sde_log_prob(p["x_t"], velocity, p["x_next"], p["c_rows"], backend="native")
        p |= {"velocity": velocity, "old_velocity": None, "old_log_prob": recorded}
        assert (fk.policy_loss(**p, backend="native").ratio == 1).all()


# ---- autograd, compilers, edges of the domain ----


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_incoming_gradients(reduction):
    p, _ = problem(6, (130,), dtype=torch.float32, drift=0.3)
    shape = (6,) if reduction == "none" else ()
    for grad in (torch.randn(shape), torch.zeros(shape), torch.tensor(2.0).expand(shape)):
        got = evaluate(p, grad=grad, reduction=reduction, **WIDE)[-1]
        true = evaluate(double(p), "reference", grad=grad.double(), reduction=reduction, **WIDE)[-1]
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-7)


def test_empty_batches_and_empty_latents():
    p, _ = problem(3, (4,), dtype=torch.float32)
    empty = {k: v[:0] for k, v in p.items()}
    for reduction in ("none", "sum", "mean"):
        got = evaluate(empty, reduction=reduction)
        assert all(x.numel() == 0 for x in got[1:]) and got[0].sum() == 0
    none = torch.zeros(0, dtype=torch.int64)
    without_samples = p | {"x_next": p["x_next"][:0], "row": none, "c_rows": p["c_rows"][:0]}
    got = evaluate(without_samples | {"advantage": torch.zeros(0)})
    assert got[-1].shape == (3, 4) and (got[-1] == 0).all()
    thin = {k: v[:, :0] if k not in ("advantage", "c_rows") else v for k, v in p.items()}
    for ratio in ("sde", "guard"):
        got, plain = (evaluate(thin, b, ratio=ratio) for b in ("native", "reference"))
        assert same(got, plain)


def operator_arguments(x_next, row, ratio):
    p, _ = problem(6, (33,), dtype=torch.float32)
    v, old, x_t = (p[n].detach()[:4] for n in ("velocity", "old_velocity", "x_t"))
    ids = torch.arange(6)
    key = (None,) * 4 if x_next else (None, 3, ids, ids + 1)
    return PolicyInputs(
        v.requires_grad_(), x_t, p["x_next"] if x_next else None, p["c_rows"].table.float(),
        p["advantage"], row, old, None, *key, x_t + 1, 4.5, x_t.clone(), torch.rand(6),
        torch.rand(6), 1e-4, 1e-4, ratio, "none",
    )  # fmt: skip


@pytest.mark.parametrize("ratio", ["sde", "guard"])
@pytest.mark.parametrize("x_next", [True, False])
def test_opcheck(ratio, x_next):
    arguments = operator_arguments(x_next, torch.tensor([3, 0, 0, 2, 2, 2]), ratio)
    arguments = LOSS.op_arguments(arguments, "native")
    torch.library.opcheck(torch.ops.flowkern.policy_loss, arguments)


def test_a_row_out_of_range_is_an_error_in_compiled_code_too():
    arguments = operator_arguments(True, torch.tensor([3, 0, 0, 2, 4, 2]), "sde")
    with pytest.raises(IndexError, match=r"row: expected values in \[0, 4\), got 4"):
        torch.ops.flowkern.policy_loss(*LOSS.op_arguments(arguments, "native"))
    slopes = torch.zeros(6, 2)
    with pytest.raises(IndexError, match="row: expected values"):
        native_impl.backward(torch.ones(6), slopes, arguments, None)


def test_eager_and_compiled_take_the_same_kernel():
    p, _ = problem(4, (333,), dtype=torch.float32, drift=0.3)
    ref = p["x_t"] + 1

    def gradient(v):
        v = v.detach().requires_grad_()
        out = fk.policy_loss(
            **p | {"velocity": v}, velocity_ref=ref, kl_coef=0.1, backend="native", **WIDE
        )
        out.loss.backward()
        return [*out, v.grad]

    op = torch.compile(
        lambda v: fk.policy_loss(
            **p | {"velocity": v}, velocity_ref=ref, kl_coef=0.1, backend="native", **WIDE
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    v = p["velocity"].detach().requires_grad_()
    out = op(v)
    out.loss.backward()
    assert same([*out, v.grad], gradient(p["velocity"]))
