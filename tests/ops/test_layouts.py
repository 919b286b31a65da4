"""Every latent argument in every layout torch has: the values of a plain copy, or a refusal that
names the argument. A kernel sees an address, so what lies there must be what the tensor means.
"""

import pytest
import torch
from calls import Problem, take
from needs import needs_native

import flowkern as fk
from flowkern.schedules import Coefficients, sd3_sigmas, step_coefficients

SIZE = (4, 6, 8)
C = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[torch.tensor([1, 4, 8])]
CALLS = take(("has no latent: below", lambda call: call.verb == "philox_normal"))
every_call = pytest.mark.parametrize("call", CALLS, ids=str)


def latents_of(p):
    return {n: (p[n][0] if n == "history" else p[n]).detach() for n in p.latents}


def with_one(p, name, x):
    """`x` as an argument of the problem, or as the first of its history."""
    return {name: [x, *p[name][1:]] if name == "history" else x}


def negated(x):
    """The values of `x`, as a view of memory that holds the other sign."""
    view = torch._neg_view(-x)
    assert view.is_neg() and torch.equal(view, x)
    return view


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "samples_innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "permuted": lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    "every_second": lambda x: torch.stack([x, x + 9], -1)[..., 0],
    "samples_apart": lambda x: torch.cat([x, x + 9], 1)[:, : SIZE[0]],
    "imaginary_part": lambda x: torch.complex(x + 9, -x).conj().imag,
    "one_sample_for_all": lambda x: x[:1].expand(x.shape),
    "one_channel_for_all": lambda x: x[:, :1].expand(x.shape),
    "one_value_for_all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "negated": negated,
    "negated_samples_apart": lambda x: negated(torch.cat([x, x + 9], 1))[:, : SIZE[0]],
    "negated_sample_for_all": lambda x: negated(x[:1]).expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_call
def test_values_are_those_of_a_plain_copy(call, layout):
    """Of each latent; and of what is per sample, where it is negated."""
    p = Problem(call, 3, SIZE)
    tensors = {n: x for n, x in p.arguments.items() if isinstance(x, torch.Tensor)}
    if layout != "negated":
        tensors = {}
    for name, x in (tensors | latents_of(p)).items():
        laid_out = LAYOUTS[layout](x.detach())
        values = torch.empty(x.shape, dtype=x.dtype).copy_(laid_out)
        if name == call.learned:
            laid_out, values = (y.detach().requires_grad_() for y in (laid_out, values))
        results = [p.run(**with_one(p, name, y)) for y in (laid_out, values)]
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected), name


@pytest.mark.parametrize("call", [c for c in CALLS if c.learned], ids=str)
def test_a_negated_gradient(call):
    p = Problem(call, 3, SIZE)
    expected = p.run()[-1]
    p.weight = negated(p.weight)
    assert torch.equal(p.run()[-1], expected)


REFUSED = {
    "sparse": (lambda x: x.to_sparse(), "expected a dense tensor, got the layout torch.sparse_coo"),
    "sparse_rows": (lambda x: x.to_sparse_csr(), "expected a dense tensor, got the layout"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "expected float32"),
    "complex": (lambda x: torch.complex(x, x).conj(), "expected float32.*got torch.complex64"),
    "8 bits": (lambda x: x.to(torch.float8_e4m3fn), "expected float32.*got torch.float8_e4m3fn"),
}  # fmt: skip


@pytest.mark.parametrize("layout", REFUSED)
@every_call
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_is_not_dense_is_refused_by_name(call, layout, backend):
    make, message = REFUSED[layout]
    p = Problem(call, 3, SIZE)
    for name, x in latents_of(p).items():
        with pytest.raises(TypeError, match=rf"^{name}(\[0\])?: {message}"):
            p.run(backend, **with_one(p, name, make(x)))


@pytest.mark.parametrize("call", ["philox_normal", "policy_loss, drawn again"])
def test_negated_keys_of_noise(call):
    p, values = Problem(call), torch.tensor([0, 3, 7])
    for name in ("sample_id", "step"):
        results = [p.run(**{name: x}) for x in (values, negated(values))]
        assert all(map(torch.equal, *results)), name


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def freed_at_an_offset(x):
    """Where the address is that of the offset, and not null."""
    x = torch.cat([x, x])[len(x) :]
    x.untyped_storage().resize_(0)
    return x


WITHOUT_MEMORY = {
    "freed": freed,
    "freed_at_an_offset": freed_at_an_offset,
    "zero": lambda x: torch._efficientzerotensor(x.shape),
    "functional": torch._to_functional_tensor,
}


@needs_native
@every_call
@pytest.mark.parametrize("make", WITHOUT_MEMORY)
def test_a_tensor_without_memory_is_refused(call, make):
    """Freed storage, as sharded training leaves behind, must not be read."""
    p = Problem(call, 3, SIZE)
    per_sample = {"advantage", "step_weight", "kl_coef", "old_log_prob"} & p.arguments.keys()
    tensors = {n: p[n] for n in per_sample if isinstance(p[n], torch.Tensor)} | latents_of(p)
    for name, x in tensors.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor with memory, got freed"):
            p.run(**with_one(p, name, WITHOUT_MEMORY[make](x)))


def test_memory_that_cannot_be_written_as_it_is_is_refused(backend):
    x, v = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for out, message in (
        (torch._neg_view(torch.empty(2, 3, 8)), "out: expected memory to write, got a negated"),
        (torch.empty(1, 3, 8).expand(2, 3, 8), "out: expected a contiguous tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            fk.ode_step(x, v, C[0], out=out, backend=backend)


def test_a_negated_table():
    x, v = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    table = C.table[:2].float()
    expected = fk.ode_step(x, v, Coefficients(table))
    assert torch.equal(fk.ode_step(x, v, Coefficients(negated(table))), expected)
