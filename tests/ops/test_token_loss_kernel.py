"""The loop of the token loss and its native row kernel: gradients that are given away, chunks,
instruction sets, strides, drawn calls, compilers.
"""

import math

import pytest
import torch
from tokens import CASES, Tokens, errors, native, relative
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern as fk
from flowkern.ops.token_loss.chunks import chunk_rows

# ---- autograd ----


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_backward_pass_makes_the_gradients_again(dtype):
    p = Tokens(300, 16, 100, dtype, budget_bytes=1)
    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    out = fk.linear_policy_loss(inputs[0], inputs[1], p.ids, bias=inputs[2], **p.options)
    first = torch.autograd.grad(3 * out.loss, inputs, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * out.loss, inputs, retain_graph=True)
    once = p.solve()
    for a, b, c, one in zip(first, kept, second, once.gradients, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert relative(a, 3 * one.double()) < (1e-6 if dtype == torch.float32 else 1e-2)
    with torch.no_grad():
        inputs[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@native
def test_a_gradient_is_given_away_and_not_copied():
    """The head's is the largest tensor of a step."""
    p = Tokens(30, 16, 100)
    weight = p.weight.clone().requires_grad_()
    out = fk.linear_policy_loss(p.hidden, weight, p.ids, bias=p.bias, **p.options)
    address = out.loss.grad_fn.made.gradients[1].data_ptr()
    out.loss.backward()
    assert weight.grad.data_ptr() == address


@native
def test_kernels_refuse_second_derivatives():
    p = Tokens(5, 8, 20)
    hidden = p.hidden.clone().requires_grad_()
    for loss in (
        fk.linear_policy_loss(hidden, p.weight, p.ids, **p.options).loss,
        fk.linear_log_prob(hidden, p.weight, p.ids).sum(),
    ):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True)


# ---- chunks ----


@pytest.mark.parametrize("vocabulary", [1, 50_257, 151_936, 152_064, 128_256])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1024, 8192, 70_000])
@pytest.mark.parametrize("budget", [1, 2**25, 2**28, 2**30])
def test_chunks_stay_within_the_budget(count, vocabulary, budget):
    rows = chunk_rows(count, vocabulary, 2, budget)
    width = -(-vocabulary // 16) * 16
    assert 1 <= rows and (rows <= 256 or rows * width * 2 <= budget)
    chunks = max(1, -(-count // rows))
    most = max(256, budget // (width * 2))
    assert chunks <= -(-max(1, count) // most)  # not one more than it takes


@native
def test_more_tokens_than_16_bits_count_and_a_vocabulary_of_any_length():
    p = Tokens(66_000, 2, 3)
    assert max(errors(p.solve("native"), p.truth()).values()) < 1e-5
    for vocabulary in (1, 2, 1023, 1024, 1025, 50_257):
        p = Tokens(3, 64, vocabulary, entropy_coef=0.1)
        solved, truth = p.solve("native"), p.truth()
        assert max(errors(solved, truth, p.terms(truth.out)).values()) < 1e-5


@native
@pytest.mark.parametrize("name", ["all", "plain"])
def test_every_instruction_set_of_this_processor(name):
    from flowkern import _cpu

    p, names, widest = (
        Tokens(40, 24, 2500, **CASES[name]),
        ["baseline", "avx2", "avx512"],
        _cpu.isa(),
    )
    try:
        for isa in names[: names.index(widest) + 1]:
            _cpu.use_isa(isa)
            assert max(errors(p.solve("native"), p.truth()).values()) < 1e-5, isa
    finally:
        _cpu.use_isa(widest)


@native
@pytest.mark.parametrize("make", [torch.Tensor.t, lambda x: x[:, ::2], lambda x: x[:, 1:]])
def test_strides(make):
    base = Tokens(20, 20, 40)
    hidden, weight = make(base.hidden), make(base.weight)
    if hidden.shape[1] != weight.shape[1]:
        hidden = hidden[:, :1].expand(-1, weight.shape[1])
    m = len(hidden)
    ids, a = torch.arange(m) % len(weight), torch.linspace(-1, 1, m)
    for x in (hidden, hidden.contiguous()):
        leaf = x.detach().requires_grad_()
        out = fk.linear_policy_loss(leaf, weight, ids, None, a, a, backend="native")
        out.loss.backward()
        if x is hidden:
            loss, grad = out.loss, leaf.grad.clone()
    assert torch.allclose(loss, out.loss) and relative(grad, leaf.grad) < 1e-6


# ---- drawn calls ----


def check_drawn(seed, backend):
    """A call that follows from its seed, against float64; whether it could be compared: a tie of
    the clip may fall either way, where float32 rounds the ratio.
    """
    g = torch.Generator().manual_seed(seed)
    draw = lambda *choices: choices[int(torch.randint(len(choices), (), generator=g))]  # noqa: E731
    options = {
        "temperature": draw(1.0, 0.6, 2.0), "kl_coef": draw(0.0, 0.2),
        "entropy_coef": draw(0.0, 0.05), "clip_low": draw(0.2, 0.0, 1.0),
        "clip_high": draw(0.2, 0.0, 5.0), "budget_bytes": draw(1, 2**20, 2**28),
        "bias": draw(True, False), "scale": draw(0.0, 2.0, 8.0),
    }  # fmt: skip
    if draw(True, False):
        options["softcap"] = draw(2.0, 30.0)
    if draw(True, False):
        options["dual_clip"] = draw(1.05, 3.0)
    if draw(True, False):
        options["is_cap"] = draw(0.9, 2.0, math.inf)
    size = draw(0, 1, 2, 7, 33, 300, 520), draw(1, 3, 16, 40), draw(1, 2, 17, 256, 1030)
    p = Tokens(*size, seed=seed, **options)
    change = {}
    if draw(True, False):
        change["advantage"] = p.options["advantage"] * draw(0.0, 1.0)
        change["token_weight"] = p.options["token_weight"].clone()
        change["token_weight"][:: draw(1, 2, 5)] = 0
    if draw(True, False, False):
        change["old_log_prob"] = None
    solved, truth = p.solve(backend, **change), p.truth(**change)
    if not torch.equal(solved.out.clipped, truth.out.clipped):
        return False
    found = errors(solved, truth, p.terms(truth.out))
    if max(found.values()) > 1e-5:  # where float32 itself gives no more
        plain = errors(p.solve("reference", **change), truth, p.terms(truth.out))
        for name, error in found.items():
            # The largest of a few errors, both: that of one call in 2,000 is 2.2 times.
            allowed = max(1e-5, 3 * plain[name], 4 * p.ulp())
            assert error <= allowed, (seed, size, options, name, error, plain[name])
    return True


@native
@pytest.mark.parametrize("seeds", [range(n, n + 250) for n in range(0, 2000, 250)], ids=str)
def test_drawn_calls_against_float64(seeds):
    compared = sum(check_drawn(seed, "native") for seed in seeds)
    assert compared >= 0.98 * len(seeds)


# ---- compilers ----


@native
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ops_are_what_they_say(name, dtype):
    p = Tokens(12, 8, 50, dtype, **CASES[name])
    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "flowkern":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Watch():
        fk.linear_policy_loss(inputs[0], inputs[1], p.ids, bias=inputs[2], **p.options)
        fk.linear_log_prob(*inputs[:2], p.ids, inputs[2])
    assert [func._schema.name for func, _ in seen] == [
        "flowkern::linear_policy_loss", "flowkern::linear_log_prob",
    ]  # fmt: skip
    for func, (hidden, weight, bias, *rest) in seen:
        inputs = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        torch.library.opcheck(
            func, (*inputs, *rest), test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@native
@pytest.mark.long(20)
@pytest.mark.parametrize("budget", [1, 2**28])
def test_compiled_whole(budget):
    p = Tokens(300, 16, 100, kl_coef=0.1, budget_bytes=budget)
    p.options["token_weight"][::4] = 0
    p.ids[::4] = -100
    eager = p.solve("native")

    def loss(hidden, weight, bias):
        out = fk.linear_policy_loss(hidden, weight, p.ids, bias=bias, **p.options)
        lp = fk.linear_log_prob(hidden, weight, p.ids.clamp(min=0), bias)
        return 3 * out.loss, out.ratio, lp

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    made, ratio, lp = compiled(*inputs)
    assert torch.equal(ratio, eager.out.ratio)
    for x, of in zip(
        torch.autograd.grad(made, inputs, retain_graph=True), eager.gradients, strict=True
    ):
        assert relative(x, 3 * of) < 1e-6
    plain = fk.linear_log_prob(*inputs[:2], p.ids.clamp(min=0), inputs[2])
    both = [torch.autograd.grad(y.sum(), inputs) for y in (lp, plain)]
    for x, of in zip(*both, strict=True):
        assert relative(x, of) < 1e-6
