"""Does tl.fma round once? On a device it does; Triton's interpreter had it round twice in 3.6."""

import pytest
import torch
import triton
import triton.language as tl

REASON = "tl.fma rounds twice in this interpreter: its normals differ in a last place"


@triton.jit
def _fma(numbers, out):
    x, y, z = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    tl.store(out, tl.fma(x, y, z))


def is_fused(device) -> bool:
    numbers = torch.tensor([1 + 2**-12, 1 + 2**-12, -(1 + 2**-11)], device=device)
    out = torch.empty(1, device=device)
    _fma[(1,)](numbers, out)
    return out.item() == 2.0**-24  # of a product that was rounded, nothing is left


def needs_fma(device):
    """For tests of bits that rest on it."""
    return pytest.mark.skipif(device.type == "cpu" and not is_fused(device), reason=REASON)
