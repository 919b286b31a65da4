"""The loop of the token loss and its native row kernel: gradients that are given away, chunks,
instruction sets, strides, drawn calls, compilers.
"""

import fuzz
import pytest
import torch
from tokens import CASES, FLOATING, Tokens, errors, native, relative
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern as fk
from flowkern.ops._common import native as native_module
from flowkern.ops.token_loss.chunks import chunk_rows
from flowkern.ops.token_loss.weights import AGGREGATIONS

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
    for written in (p.options["advantage"], inputs[1]):
        with torch.no_grad():
            written.mul_(2)
        with pytest.raises(RuntimeError, match="modified (by an inplace operation|in place)"):
            out.loss.backward(retain_graph=True)


@native
@pytest.mark.parametrize("name", FLOATING)
def test_what_a_second_backward_pass_reads_must_not_have_changed(name):
    p = Tokens(5, 8, 20, kl_coef=0.1, is_cap=2.0)
    hidden = p.hidden.clone().requires_grad_()
    with torch.inference_mode():  # which keeps no versions
        kept = {n: x + 0 for n, x in p.options.items() if n in FLOATING and n != name}
    loss = fk.linear_policy_loss(hidden, p.weight, p.ids, **p.options | kept).loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden, retain_graph=True)[0], first)
    p.options[name].add_(1)
    with pytest.raises(RuntimeError, match="has been modified in place, so a second backward"):
        loss.backward()


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_of_torch_changes_nothing(dtype):
    p = Tokens(300, 16, 100, budget_bytes=1, entropy_coef=0.1)
    rows = torch.arange(3)

    def made():
        once = p.solve()
        weights = [fk.token_weights(rows, rows, agg, 3) for agg in AGGREGATIONS]
        return *once.out, *once.gradients, p.log_prob(), *weights

    expected = made()
    torch.set_default_dtype(dtype)
    try:
        found = made()
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


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


@native
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_drawn_calls_against_float64(first):
    """As tests/fuzz draws and checks them, which draws 2,000 and more."""
    kept = torch.get_num_threads(), native_module.cpu().isa()
    backends = {op.name: ("native", "") for op in fuzz.TOKENS}
    try:
        for index in range(first, first + 25):
            fuzz.one_call(fuzz.TOKENS, backends, f"0:{index}", "cpu")
    finally:
        torch.set_num_threads(kept[0])
        native_module.cpu().use_isa(kept[1])


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
        with pytest.raises(IndexError, match="^ids: "):  # while traced they have no values
            func(hidden, weight, bias, rest[0] + 50, *rest[1:])


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
