"""Every latent argument in every layout torch has: the values of a plain copy, or a refusal that
names the argument. A kernel sees an address, so what lies there must be what the tensor means.
"""

import pytest
import torch

import flowkern as fk
from flowkern.schedules import Coefficients, multistep_coefficients, sd3_sigmas, step_coefficients

SHAPE = (3, 4, 6, 8)
C = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[torch.tensor([1, 4, 8])]
M = multistep_coefficients((0.9, 0.8, 0.7), 2)
PER_SAMPLE = {
    "advantage": torch.tensor([1.0, -1.0, 0.5]),
    "sigma": torch.tensor([0.2, 0.5, 0.8]),
    "step_weight": torch.tensor([1.0, 0.5, 2.0]),
    "kl_coef": torch.tensor([0.1, 0.2, 0.3]),
    "old_log_prob": torch.tensor([-1.0, -1.1, -1.2]),
}
GUIDED = {"guidance_scale": 3.0}
LOSS = {"clip_low": 0.999, "clip_high": 1e6, "reduction": "none"}


def sde_step(history, **latents):
    return fk.sde_step(**latents, c_rows=C, history=[history], **GUIDED)


def ode_step(history, **latents):
    return fk.ode_step(**latents, m_rows=M, history=[history], return_x0=True, **GUIDED)


def sde_log_prob(**latents):
    return (fk.sde_log_prob(**latents, c_rows=C, **GUIDED),)


def policy_loss(**arguments):
    return fk.policy_loss(**arguments, c_rows=C, **GUIDED, **LOSS)


def policy_loss_drawn_again(**arguments):
    return fk.policy_loss(**arguments, x_next=None, c_rows=C, **LOSS)


def policy_loss_recorded(**arguments):
    return fk.policy_loss(**arguments, c_rows=C, **LOSS)


def awm(**arguments):
    return fk.matching_loss(**arguments, ref_coef=0.1, ema_coef=0.2, **LOSS)


def nft(**arguments):
    return fk.matching_loss(**arguments, objective="nft", reduction="none")


def add_noise(**arguments):
    return (fk.add_noise(**arguments),)


STEP = ("x_t", "velocity", "velocity_uncond")
CALLS = {
    sde_step: (*STEP, "noise", "history"),
    ode_step: (*STEP, "history"),
    sde_log_prob: (*STEP, "x_next"),
    policy_loss: (
        *STEP, "x_next", "old_velocity", "velocity_ref", "advantage", "step_weight", "kl_coef",
    ),
    policy_loss_drawn_again: ("velocity", "x_t", "old_velocity", "noise", "advantage"),
    policy_loss_recorded: ("velocity", "x_t", "x_next", "old_log_prob", "advantage"),
    awm: (
        "velocity", "x0", "noise", "old_velocity", "velocity_ref", "velocity_ema", "advantage",
        "sigma",
    ),
    nft: ("velocity", "x0", "noise", "old_velocity", "advantage", "sigma"),
    add_noise: ("x0", "noise", "sigma"),
}  # fmt: skip
HAVE_A_GRADIENT = (
    sde_log_prob,
    policy_loss,
    policy_loss_drawn_again,
    policy_loss_recorded,
    awm,
    nft,
)
needs_native = pytest.mark.skipif(
    fk.backends()["native"] is not None, reason=str(fk.backends()["native"])
)


def arguments_of(call):
    g = torch.Generator().manual_seed(0)
    return {
        n: PER_SAMPLE[n] if n in PER_SAMPLE else torch.randn(SHAPE, generator=g)
        for n in CALLS[call]
    }


def run(call, arguments):
    """All outputs, and the gradient where there is one."""
    if call not in HAVE_A_GRADIENT:
        return list(call(**arguments))
    arguments = arguments | {"velocity": arguments["velocity"].detach().requires_grad_()}
    outputs = call(**arguments)
    return [*outputs, *torch.autograd.grad(outputs[0].sum(), arguments["velocity"])]


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
    "samples_apart": lambda x: torch.cat([x, x + 9], 1)[:, : SHAPE[1]],
    "imaginary_part": lambda x: torch.complex(x + 9, -x).conj().imag,
    "one_sample_for_all": lambda x: x[:1].expand(SHAPE),
    "one_channel_for_all": lambda x: x[:, :1].expand(SHAPE),
    "one_value_for_all": lambda x: x[:1, :1, :1, :1].expand(SHAPE),
    "negated": negated,
    "negated_samples_apart": lambda x: negated(torch.cat([x, x + 9], 1))[:, : SHAPE[1]],
    "negated_sample_for_all": lambda x: negated(x[:1]).expand(SHAPE),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_values_are_those_of_a_plain_copy(call, layout):
    plain = arguments_of(call)
    for name in CALLS[call]:
        x = plain[name]
        if x.ndim == 4:
            laid_out = LAYOUTS[layout](x)
        elif layout == "negated":
            laid_out = negated(x)
        else:
            continue
        values = torch.empty(x.shape).copy_(laid_out)
        for got, expected in zip(
            run(call, plain | {name: laid_out}), run(call, plain | {name: values}), strict=True
        ):
            assert torch.equal(got, expected), name


@pytest.mark.parametrize("call", HAVE_A_GRADIENT, ids=lambda call: call.__name__)
def test_a_negated_gradient(call):
    arguments = arguments_of(call)
    velocity = arguments["velocity"].requires_grad_()
    weights = torch.tensor([1.0, -2.0, 3.0])
    results = [
        torch.autograd.grad(call(**arguments)[0], velocity, w)[0]
        for w in (weights, negated(weights))
    ]
    assert torch.equal(*results)


REFUSED = {
    "sparse": (lambda x: x.to_sparse(), "expected a dense tensor, got the layout torch.sparse_coo"),
    "sparse_rows": (lambda x: x.to_sparse_csr(), "expected a dense tensor, got the layout"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "expected float32"),
    "complex": (lambda x: torch.complex(x, x).conj(), "expected float32.*got torch.complex64"),
    "8 bits": (lambda x: x.to(torch.float8_e4m3fn), "expected float32.*got torch.float8_e4m3fn"),
}  # fmt: skip


@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_is_not_dense_is_refused_by_name(call, layout, backend):
    make, message = REFUSED[layout]
    plain = arguments_of(call)
    for name in (n for n in plain if plain[n].ndim == 4):
        called = "history.0." if name == "history" else name
        with pytest.raises(TypeError, match=f"^{called}: {message}"):
            call(**plain | {name: make(plain[name])})


def test_negated_integers():
    latents = {n: torch.randn(3, 40) for n in ("x_t", "velocity", "old_velocity")}
    key = {"sample_id": torch.tensor([5, -2, 9]), "step": torch.tensor([0, 3, 7])}
    row = torch.tensor([2, 0, 1])
    expected = fk.philox_normal((3, 40), 1, **key)
    assert torch.equal(
        fk.philox_normal((3, 40), 1, **{n: negated(x) for n, x in key.items()}), expected
    )
    call = lambda row, **k: fk.policy_loss(  # noqa: E731
        **latents, x_next=None, c_rows=C, advantage=torch.ones(3), row=row, seed=1, **k, **LOSS
    )
    expected = call(row, **key)
    for change in ("row", *key):
        arguments = {"row": row} | key
        got = call(**arguments | {change: negated(arguments[change])})
        assert all(map(torch.equal, got, expected)), change


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
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("make", WITHOUT_MEMORY)
def test_a_tensor_without_memory_is_refused(call, make):
    """Freed storage, as sharded training leaves behind, must not be read."""
    plain = arguments_of(call)
    for name in plain.keys() - {"sigma"}:  # its values torch looks at before
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor with memory, got freed"):
            call(**plain | {name: WITHOUT_MEMORY[make](plain[name])})


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
