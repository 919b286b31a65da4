"""The token loss: how close to float64, its laws, other losses by the same calls, heads, errors."""

import math

import pytest
import torch
from tokens import (  # noqa: F401
    CASES,
    STATISTICS,
    Tokens,
    eager,
    errors,
    gemms_of_16_bits,
    native,
    relative,
)

import flowkern as fk
from flowkern.ops.token_loss import chunks

# ---- against float64 ----


@native
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(1, 8, 5), (40, 24, 1003), (600, 16, 257)], ids=str)
def test_float32_against_float64(name, size):
    p = Tokens(*size, **CASES[name])
    solved, truth = p.solve("native"), p.truth()
    assert max(errors(solved, truth).values()) < 1e-5
    assert torch.equal(solved.out.clipped, truth.out.clipped)
    both = p.log_prob("native"), p.log_prob("reference", torch.float64)
    assert relative(*both) < 1e-5


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gemms", ["its own", "16 bits"])
@pytest.mark.parametrize("name", ["plain", "temperature", "softcap", "kl", "entropy", "chunks"])
def test_16_bits_err_at_most_twice_as_eager(name, dtype, gemms, request):
    """Root mean squares: the largest of a few thousand errors is luck."""
    if gemms == "16 bits":
        request.getfixturevalue("gemms_of_16_bits")
    p = Tokens(600, 48, 1003, dtype, **CASES[name])
    solved, truth, (lp, gradients) = p.solve("native"), p.truth(), eager(p)
    rms = lambda x, of: float((x.double() - of.double()).square().mean().sqrt())  # noqa: E731
    assert rms(solved.out.log_prob, truth.out.log_prob) <= 2 * rms(lp, truth.out.log_prob)
    mine = [x for x in solved.gradients if x is not None]
    true = [x for x in truth.gradients if x is not None]
    for made, plain, of in zip(mine, gradients, true, strict=True):
        assert rms(made, of) <= 2 * rms(plain, of)


def test_the_reference_against_finite_differences():
    p = Tokens(5, 4, 7, torch.float64, **(CASES["all"] | {"budget_bytes": 1}))
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]

    def loss(hidden, weight, bias):
        return fk.linear_policy_loss(hidden, weight, p.ids, bias=bias, **options).loss

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    assert torch.autograd.gradcheck(lambda *x: fk.linear_log_prob(*x[:2], p.ids, x[2]), inputs)


@native
@pytest.mark.parametrize("size", [1e-6, 1e3])
@pytest.mark.parametrize("budget", [1, 2**28])
def test_float16_holds_the_gradients_of_any_weights(size, budget):
    """A gradient of 1e-6 / V is 0 in float16; the scale of a loss comes too late for it."""
    p = Tokens(300, 48, 1003, torch.float16, budget_bytes=budget)
    p.options["token_weight"] *= 300 * size
    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    out = fk.linear_policy_loss(*inputs[:2], p.ids, bias=inputs[2], **p.options)
    made = torch.autograd.grad(out.loss / size, inputs)
    truth = p.truth()
    assert float((out.loss - truth.out.loss).detach().abs() / size) < 1e-1
    for x, of in zip(made, truth.gradients, strict=True):
        assert relative(x, of / size) < 5e-3


@native
@pytest.mark.parametrize("one", [1e-44, math.nan, math.inf])
def test_a_weight_that_no_float16_holds_is_its_own_row_s_matter(one):
    p = Tokens(20, 16, 100, torch.float16)
    p.options["token_weight"] = torch.full((20,), 1e-44 if one < 1 else 1e-3)
    p.options["token_weight"][3] = one
    hidden = p.hidden.clone().requires_grad_()
    fk.linear_policy_loss(hidden, p.weight, p.ids, bias=p.bias, **p.options).loss.backward()
    is_finite = hidden.grad.isfinite().all(1)
    assert is_finite.tolist() == [one < 1 or i != 3 for i in range(20)]


@native
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30])
def test_large_logits(scale):
    """Of 1e4 and more: nothing overflows, and an id of probability 0 has a finite log-prob."""
    hidden = torch.tensor([[scale, 1.0], [-scale, 1.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    for id in range(3):
        ids = torch.tensor([id, id])
        made = fk.linear_log_prob(hidden, weight, ids, backend="native")
        true = fk.linear_log_prob(hidden.double(), weight.double(), ids)
        assert made.isfinite().all() and relative(made, true) < 1e-6


@native
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vocabulary_that_is_masked_with_infinite_biases(dtype, with_entropy):
    """A whole chunk of them first, as heads with padded vocabularies have at their end."""
    p = Tokens(9, 8, 3000, dtype, entropy_coef=0.1 * with_entropy)
    p.bias[:1500] = -math.inf
    p.ids.clamp_(min=1500)
    options = p.options | {"old_log_prob": p.log_prob("reference", torch.float64).float()}
    solved, truth = p.solve("native", **options), p.truth(**options)
    found = errors(solved, truth)
    assert max(found.values()) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert not solved.gradients[1][:1500].any()


@native
def test_a_value_that_is_no_number_shows():
    p = Tokens(4, 8, 2000)
    p.hidden[2, 3] = math.nan
    solved = p.solve("native")
    assert solved.out.loss.isnan() and solved.gradients[1].isnan().any()
    assert solved.out.log_prob.isnan().tolist() == [False, False, True, False]


# ---- laws ----


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [1, 2**28])
def test_the_ratio_of_a_policy_to_itself_is_exactly_1(dtype, budget):
    p = Tokens(700, 32, 1003, dtype, budget_bytes=budget, temperature=0.8)
    lp = p.log_prob("native", budget_bytes=budget)
    same, on = p.solve("native", old_log_prob=lp), p.solve("native", old_log_prob=None)
    assert torch.equal(same.out.log_prob, lp) and (same.out.ratio == 1).all()
    assert (on.out.ratio == 1).all()
    for one, other in zip(same.gradients, on.gradients, strict=True):
        assert torch.equal(one, other)
    # And the gradient is REINFORCE's.
    inputs = [x.double().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    lp = fk.linear_log_prob(*inputs[:2], p.ids, inputs[2], temperature=0.8)
    weight = (p.options["token_weight"] * p.options["advantage"]).double()
    true = torch.autograd.grad(-(weight * lp).sum(), inputs)
    for made, of in zip(on.gradients, true, strict=True):
        assert relative(made, of) < (1e-5 if dtype == torch.float32 else 2e-2)


@native
def test_another_packing_changes_a_log_prob_by_ulps():
    """Within 4 of the largest logit, and so does another size of chunks, or weights of 0."""
    p = Tokens(700, 32, 1003, kl_coef=0.1)
    ulp, lp = p.ulp(), p.log_prob("native")
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    for index in (order, order[:1], order[:300]):
        part = fk.linear_log_prob(p.hidden[index], p.weight, p.ids[index], p.bias)
        assert (part - lp[index]).abs().max() <= 4 * ulp
    assert (p.log_prob("native", budget_bytes=1) - lp).abs().max() <= 4 * ulp


@native
@pytest.mark.parametrize("name", ["plain", "chunks", "all"])
def test_tokens_without_weight_cost_nothing_and_have_zeros(name, monkeypatch):
    p = Tokens(600, 16, 257, **CASES[name])
    weight, ids = p.options["token_weight"].clone(), p.ids.clone()
    weight[::3] = 0
    truth = p.truth(token_weight=weight)
    p.ids[::3] = -100
    rows, logits = [], chunks._logits
    count = lambda h, *rest: rows.append(len(h)) or logits(h, *rest)  # noqa: E731
    monkeypatch.setattr(chunks, "_logits", count)
    solved = p.solve("native", token_weight=weight)
    assert sum(rows) == 400
    for name in (*STATISTICS, "clipped"):
        assert not getattr(solved.out, name)[::3].any()
    p.ids = ids
    for made, of in zip(solved.gradients, truth.gradients, strict=True):
        assert relative(made, of) < 1e-5
    assert not solved.gradients[0][::3].any()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [0, 30])
def test_gradients_are_zeros_where_nothing_weighs(m, dtype):
    p = Tokens(m, 8, 50, dtype)
    solved = p.solve("native", token_weight=torch.zeros(m))
    assert solved.out.loss == 0
    for x, of in zip(solved.gradients, (p.hidden, p.weight, p.bias), strict=True):
        assert x.shape == of.shape and x.dtype == dtype and not x.any()


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC 9B14", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "amx_bf16": False, "avx512_bf16": True}, torch.float32),
        ({"cpu_name": "AMD EPYC 7763", "avx512_bf16": False}, torch.float32),
        ({"architecture": "aarch64", "bf16": True}, torch.float32),
    ],
)
def test_gemms_of_16_bits_are_made_where_they_are_faster(has, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    on_cpu = torch.device("cpu")
    assert chunks.gemm_dtype(on_cpu, torch.bfloat16) == dtype
    assert chunks.gemm_dtype(on_cpu, torch.float16) == torch.float32
    assert chunks.gemm_dtype(torch.device("cuda"), torch.float16) == torch.float16


@native
def test_tokens_without_advantage_go_through_one_gemm(monkeypatch):
    """But for what lies between those that learn: runs far apart are GEMMs of their own."""
    p = Tokens(1500, 8, 50, budget_bytes=1)
    advantage = torch.zeros(1500)
    advantage[[3, 100, 900, 1499]] = 1.0
    seen, add = [], chunks.Gradients.add
    monkeypatch.setattr(
        chunks.Gradients, "add", lambda self, x, rows: seen.append(rows) or add(self, x, rows)
    )
    solved, truth = p.solve("native", advantage=advantage), p.truth(advantage=advantage)
    assert [(s.start, s.stop) for s in seen] == [(3, 101), (900, 901), (1499, 1500)]
    assert max(errors(solved, truth).values()) < 1e-5
    seen.clear()
    p.solve("native", advantage=advantage, entropy_coef=0.1)
    assert sum(s.stop - s.start for s in seen) == 1500


@native
def test_gradients_accumulate_over_batches_and_processes():
    """With weights of global counts, parts add up to the whole."""
    p = Tokens(90, 16, 100, kl_coef=0.1)
    whole = p.solve("native")
    sums = [torch.zeros_like(x) for x in whole.gradients]
    loss = 0
    for index in (slice(0, 17), slice(17, 60), slice(60, 90)):
        inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
        options = {k: v[index] if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
        out = fk.linear_policy_loss(
            inputs[0][index], inputs[1], p.ids[index], bias=inputs[2], **options
        )
        out.loss.backward()
        loss += out.loss.detach()
        for total, x in zip(sums, inputs, strict=True):
            total += x.grad
    assert float((loss - whole.out.loss).abs()) < 1e-6
    for total, x in zip(sums, whole.gradients, strict=True):
        assert relative(total, x) < 1e-5


def test_dual_clip_is_a_cap_of_the_ratio():
    """Where the cap is above the clip range: -A min(r, cap), whatever the sign of A."""
    p = Tokens(400, 16, 100, dual_clip=1.5, clip_low=0.2, clip_high=0.3)
    out = p.truth().out
    r, a = out.ratio, p.options["advantage"].double()
    capped = torch.maximum(-a * r.clamp(max=1.5), -a * r.clamp(0.8, 1.3))
    assert torch.allclose(out.loss, (p.options["token_weight"] * capped).sum())
    assert ((a < 0) & (r > 1.5)).sum() > 3


def test_the_ratio_is_constant_beyond_its_largest():
    p = Tokens(6, 8, 20)
    lp = p.log_prob("reference", torch.float64).float()
    options = {"old_log_prob": lp - 30, "advantage": -torch.ones(6)}
    backends = ["reference"] + ["native"] * (fk.backends()["native"] is None)
    for solved in [p.solve(backend, **options) for backend in backends]:
        assert torch.allclose(solved.out.ratio, torch.tensor(math.exp(20.0)))
        assert not any(x.any() for x in solved.gradients)


# ---- other losses by the same calls ----


def autograd_of(p, loss):
    inputs = [x.double().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    lp = fk.linear_log_prob(*inputs[:2], p.ids, inputs[2])
    return torch.autograd.grad(loss(lp), inputs)


@native
def test_ratios_of_sequences_in_two_phases():
    """GSPO: the ratio of a sequence is the geometric mean of its tokens'."""
    p = Tokens(60, 16, 100)
    sequence = torch.arange(60) // 12
    old, a, w = (p.options[k].double() for k in ("old_log_prob", "advantage", "token_weight"))

    def loss(lp):
        d = lp.double() - old
        r = (d.new_zeros(5).index_add(0, sequence, d) / 12).exp()[sequence]
        return (w * torch.maximum(-a * r, -a * r.clamp(0.99, 1.01))).sum()

    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    lp = fk.linear_log_prob(*inputs[:2], p.ids, inputs[2], backend="native", budget_bytes=1)
    for made, of in zip(torch.autograd.grad(loss(lp), inputs), autograd_of(p, loss), strict=True):
        assert made.any() and relative(made, of) < 1e-5


@native
def test_cispo_is_a_correction_of_the_on_policy_loss():
    """Its ratio is a constant, capped: min(exp(lp - old), cap) A d lp."""
    p = Tokens(60, 16, 100)
    old, a, w = (p.options[k].double() for k in ("old_log_prob", "advantage", "token_weight"))
    loss = lambda lp: -(w * (lp - old).exp().clamp(max=1.1).detach() * a * lp).sum()  # noqa: E731
    options = {"sample_log_prob": p.options["old_log_prob"], "is_cap": 1.1, "old_log_prob": None}
    made = p.solve("native", **options)
    for x, of in zip(made.gradients, autograd_of(p, loss), strict=True):
        assert relative(x, of) < 1e-5


@native
def test_dr_grpo_is_a_weight():
    """No mean over a response's length: a sum over tokens by a constant."""
    p = Tokens(10, 16, 100)
    row = torch.arange(10)
    w = fk.token_weights(row, row, "constant", total=2 * 512)
    made = p.solve("native", token_weight=w)
    out = made.out
    a, r = p.options["advantage"], out.ratio
    plain = torch.maximum(-a * r, -a * r.clamp(0.8, 1.2)).sum() / (2 * 512)
    assert torch.allclose(out.loss, plain)


# ---- heads ----


@native
def test_a_tied_head_gets_both_gradients():
    torch.manual_seed(0)
    weight, ids = torch.randn(40, 8, requires_grad=True), torch.randint(40, (12,))

    def loss(weight, dtype, backend):
        hidden = torch.tanh(torch.nn.functional.embedding(ids, weight))
        a, w = torch.linspace(-1, 1, 12, dtype=dtype), torch.full((12,), 0.1, dtype=dtype)
        return fk.linear_policy_loss(
            hidden, weight, ids.roll(-1), None, a, w, entropy_coef=0.1, backend=backend
        ).loss

    (made,) = torch.autograd.grad(loss(weight, torch.float32, "native"), weight)
    wide = weight.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(loss(wide, torch.float64, "reference"), wide)
    assert relative(made, true) < 1e-5


@native
def test_an_adapter_on_the_head():
    """W + B A in its place: the gradient goes on to A and B, and W gets none."""
    p = Tokens(50, 16, 100, bias=False)
    torch.manual_seed(0)
    down, up = (torch.randn(*size).mul(0.3).requires_grad_() for size in ((4, 16), (100, 4)))

    def gradients(dtype, backend):
        a, b = (x.detach().to(dtype).requires_grad_() for x in (down, up))
        options = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in p.options.items()
        }
        weight = p.weight.to(dtype) + b @ a
        out = fk.linear_policy_loss(p.hidden.to(dtype), weight, p.ids, **options, backend=backend)
        return torch.autograd.grad(out.loss, (a, b))

    for made, of in zip(
        gradients(torch.float32, "native"), gradients(torch.float64, "reference"), strict=True
    ):
        assert relative(made, of) < 1e-5


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_head_costs_two_gemms(dtype):
    p = Tokens(300, 16, 100, dtype, budget_bytes=1)
    hidden = p.hidden.clone().requires_grad_()
    out = fk.linear_policy_loss(hidden, p.weight, p.ids, bias=p.bias, **p.options)
    out.loss.backward()
    assert p.weight.grad is None and torch.equal(hidden.grad, p.solve().gradients[0])
    weight = p.weight.clone().requires_grad_()
    out = fk.linear_policy_loss(p.hidden, weight, p.ids, bias=p.bias, **p.options)
    out.loss.backward()
    assert torch.equal(weight.grad, p.solve().gradients[1])
    with torch.no_grad():
        out = fk.linear_policy_loss(hidden, weight, p.ids, bias=p.bias, **p.options)
    assert not out.loss.requires_grad


# ---- errors ----

WRONG = [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
    ({"hidden": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "hidden: expected float32"),
    ({"hidden": torch.ones(8)}, ValueError, r"hidden: expected a dense tensor of shape \(M, H\)"),
    ({"weight": torch.ones(20, 7)}, ValueError, r"weight: expected shape \(V, 8\)"),
    ({"weight": torch.ones(20, 8).bfloat16()}, TypeError, "weight: expected torch.float32, as"),
    ({"bias": torch.ones(7)}, ValueError, r"bias: expected a tensor of shape \(20,\)"),
    ({"ids": torch.ones(3, dtype=torch.int64)}, ValueError, r"ids: expected a tensor of shape"),
    ({"ids": torch.ones(4)}, TypeError, "ids: expected an integer tensor"),
    ({"ids": torch.full((4,), 20)}, IndexError, r"ids: expected values in \[0, 20\), got"),
    ({"old_log_prob": torch.ones(3)}, ValueError, r"old_log_prob: expected shape \(4,\)"),
    ({"advantage": None}, TypeError, "advantage: expected a tensor"),
    ({"token_weight": torch.ones(4, 1)}, ValueError, r"token_weight: expected shape \(4,\)"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a number from 1e-30 to 1e[+]30"),
    ({"temperature": 10**400}, ValueError, "temperature: expected a number from 1e-30"),
    ({"softcap": -1.0}, ValueError, "softcap: expected a number from 1e-30"),
    ({"softcap": 1e-60}, ValueError, "softcap: expected a number from 1e-30"),  # 0 in float32: none
    ({"softcap": 1e60}, ValueError, "softcap: expected a number from 1e-30"),
    ({"budget_bytes": 0}, ValueError, "budget_bytes: expected a finite number > 0"),
    ({"kl_coef": 0.1}, ValueError, "ref_log_prob: needed for a KL"),
    ({"entropy_coef": math.nan}, ValueError, "entropy_coef: expected a finite number >= 0"),
    ({"clip_low": 1.5}, ValueError, "clip_low: expected 0 <= clip_low <= 1"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip: expected a number > 1 or None"),
    ({"is_cap": 2.0}, ValueError, "sample_log_prob: got None"),
    ({"sample_log_prob": torch.ones(4)}, ValueError, "is_cap: got None"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize("wrong, kind, message", WRONG, ids=[w[2].split(":")[0] for w in WRONG])
def test_errors_name_the_argument(wrong, kind, message):
    given = {
        "hidden": torch.ones(4, 8), "weight": torch.ones(20, 8), "ids": torch.arange(4),
        "old_log_prob": torch.zeros(4), "advantage": torch.ones(4), "token_weight": torch.ones(4),
    }  # fmt: skip
    with pytest.raises(kind, match=f"^{message}"):
        fk.linear_policy_loss(**(given | wrong))


def test_backends_that_cannot_serve_say_why():
    p = Tokens(4, 8, 20)
    with pytest.raises(fk.BackendError, match="float64 is served by the reference"):
        p.log_prob("native", torch.float64)
    assert p.log_prob(None, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("name", CASES)
def test_the_reference_serves_without_kernels(name):
    """The same call, and what it gives has the same form."""
    p = Tokens(20, 8, 50, **CASES[name])
    solved, truth = p.solve("reference"), p.truth()
    assert solved.out.loss.dtype == torch.float32 and solved.out.clipped.dtype == torch.bool
    assert max(errors(solved, truth).values()) < 1e-5
