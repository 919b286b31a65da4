"""The Triton row kernel of the token loss, on a GPU or in Triton's interpreter."""

import interpreter
import pytest
import torch
from interpreter import DEVICE, INTERPRETED
from tokens import Tokens, eager, errors, gemms_of_16_bits, relative  # noqa: F401

import flowkern as fk

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gemms_of_16_bits")]  # as on a GPU
interpreter.require()

from flowkern.ops.token_loss import triton_impl  # noqa: E402

CASES = {
    "plain": {},
    "chunks": {"budget_bytes": 1, "kl_coef": 0.1, "temperature": 0.7},
    "all": {"kl_coef": 0.1, "entropy_coef": 0.05, "is_cap": 1.1, "dual_clip": 1.2, "softcap": 5.0},
}


def on_device(p):
    for name in ("hidden", "weight", "bias", "ids"):
        x = getattr(p, name)
        setattr(p, name, x if x is None else x.to(DEVICE))
    p.options = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in p.options.items()
    }
    return p


@pytest.fixture(params=[64, None], ids=["small tiles", "its tiles"])
def tiles(request, monkeypatch):
    """Rows of several tiles, of which the last is not whole."""
    if request.param:
        monkeypatch.setattr(triton_impl, "TILE", (request.param, 1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(1, 8, 5), (6, 24, 150)], ids=str)
def test_float32_against_float64(name, size, tiles):
    p = on_device(Tokens(*size, **CASES[name]))
    solved, truth = p.solve("triton"), p.truth()
    assert max(errors(solved, truth).values()) < (1e-5 if INTERPRETED else 2e-5)
    assert torch.equal(solved.out.clipped, truth.out.clipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_err_at_most_twice_as_eager(dtype):
    """Thrice where the interpreter truncates what a GPU rounds."""
    p = on_device(Tokens(24, 48, 203, dtype, kl_coef=0.1))
    solved, truth, (lp, gradients) = p.solve("triton"), p.truth(), eager(p)
    rms = lambda x, of: float((x.double() - of.double()).square().mean().sqrt())  # noqa: E731
    assert rms(solved.out.log_prob, truth.out.log_prob) <= 2 * rms(lp, truth.out.log_prob)
    factor = 3 if INTERPRETED and dtype == torch.bfloat16 else 2
    for made, plain, of in zip(solved.gradients, gradients, truth.gradients, strict=True):
        assert rms(made, of) <= factor * rms(plain, of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ratio_of_a_policy_to_itself_is_exactly_1(dtype):
    p = on_device(Tokens(9, 16, 150, dtype))
    lp = p.log_prob("triton")
    same = p.solve("triton", old_log_prob=lp)
    assert torch.equal(same.out.log_prob, lp) and (same.out.ratio == 1).all()


def test_two_phases_are_one():
    """A loss of log-probabilities gives the gradients of the fused one."""
    p = on_device(Tokens(7, 16, 150, temperature=0.8))
    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    lp = fk.linear_log_prob(*inputs[:2], p.ids, inputs[2], temperature=0.8, backend="triton")
    weight = p.options["token_weight"] * p.options["advantage"]
    made = torch.autograd.grad(-(weight * lp).sum(), inputs)
    for x, of in zip(made, p.solve("triton", old_log_prob=None).gradients, strict=True):
        assert relative(x, of) < 1e-5


def test_infinite_biases_and_values_that_are_no_numbers(tiles):
    p = on_device(Tokens(5, 8, 150, entropy_coef=0.1))
    p.bias[:70] = -torch.inf
    p.ids.clamp_(min=70)
    old = p.log_prob("reference", torch.float64).float()
    solved, truth = p.solve("triton", old_log_prob=old), p.truth(old_log_prob=old)
    assert max(errors(solved, truth).values()) < 2e-5
    assert not solved.gradients[1][:70].any()
    p.hidden[2, 3] = torch.nan
    solved = p.solve("triton", old_log_prob=old)
    assert solved.out.loss.isnan() and solved.out.log_prob.isnan().nonzero().tolist() == [[2]]


def test_tokens_without_weight_or_of_no_known_id():
    p = on_device(Tokens(6, 8, 150))
    p.options["token_weight"][1] = 0
    p.ids[1] = -100
    solved = p.solve("triton")
    assert solved.out.log_prob[1] == 0 and not solved.gradients[0][1].any()
    if DEVICE.type == "cuda":  # nobody looks at ids there
        p.ids[2] = 150
        assert p.solve("triton").out.log_prob.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 4096, 10_001])
def test_gradients_are_scaled_into_their_dtype(dtype, count, monkeypatch):
    """In place, too, where a factor of 1 leaves them as they are."""
    monkeypatch.setattr(triton_impl, "PROGRAMS", 2)  # so that each takes several tiles
    truncated = INTERPRETED and dtype == torch.bfloat16  # by the interpreter; a GPU rounds
    same = lambda x, y: torch.allclose(x.float(), y.float(), rtol=2**-7 * truncated, atol=0)  # noqa: E731
    x = torch.randn(count, device=DEVICE)
    for value in (1.0, -0.3):
        factor = torch.tensor(value, device=DEVICE)
        into, narrow = torch.empty_like(x, dtype=dtype), x.to(dtype)
        triton_impl.scaled(x, factor, into)
        assert same(into, (x * value).to(dtype))
        expected = (narrow.float() * value).to(dtype)
        triton_impl.scaled(narrow, factor, narrow)
        assert same(narrow, expected)
        assert value != 1 or torch.equal(narrow, x.to(dtype))
