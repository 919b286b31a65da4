"""What comes back to attention lies as its output does."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowkern.models import attention


@pytest.fixture
def dense_gradients(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention.plain)  # put back at the end
    attention.dense_gradients()


def test_a_gradient_lies_as_the_output_does():
    o = torch.randn(2, 5, 3, 8).permute(0, 2, 1, 3).requires_grad_()
    seen = []
    o.register_hook(lambda g: seen.append(g.stride()))
    out = attention._Dense.apply(o)
    assert torch.equal(out, o) and out.stride() == o.stride()
    wide = torch.randn(2, 5, 30)
    sliced = wide[..., :24].unflatten(2, (3, 8)).permute(0, 2, 1, 3)
    for grad in (sliced, sliced.contiguous(), torch.ones_like(o)):
        (found,) = torch.autograd.grad(out, o, grad, retain_graph=True)
        assert torch.equal(found, grad)
    assert seen == [o.stride()] * 3


def test_a_block_that_is_computed_again_has_it_too(dense_gradients, monkeypatch):
    """As its backward pass is outside of the network's call."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(
        lambda x: F.scaled_dot_product_attention(x, x, x), x, use_reentrant=False
    )
    (again,) = torch.autograd.grad(out.sum(), x)
    (once,) = torch.autograd.grad(attention.plain(x, x, x).sum(), x)
    assert torch.equal(again, once)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], ids=str)
def test_gradients_of_two_layouts(dense_gradients, way):
    """Of one shape, as in FLUX: a slice of a wider one after a dense one, and before one."""
    rows, tokens, heads, size, wider = 1, 1536, 4, 128, 640
    q, k, v = torch.randn(3, rows, tokens, heads, size, device="cuda", dtype=torch.bfloat16)
    given = torch.randn(rows, tokens, heads * size + wider, device="cuda", dtype=torch.bfloat16)

    def gradients(way, extra):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel([way]):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
        out = torch.cat(
            [out.transpose(1, 2).flatten(2), given[..., heads * size :][..., :extra]], 2
        )
        return torch.autograd.grad(out, leaves, given[..., : heads * size + extra])

    for extra in (0, wider, 0):
        right = gradients(SDPBackend.MATH, extra)
        for found, of in zip(gradients(way, extra), right, strict=True):
            assert (found - of).float().norm() <= 0.01 * of.float().norm()
