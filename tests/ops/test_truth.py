"""The kernels of the CPU against the reference in float64, and whose bits they have: every call, in
every dtype.
"""

import pytest
import torch
from calls import Problem, take
from torch.nn.functional import cosine_similarity

import flowkern as fk
from flowkern.ops._common import native

CALLS = take(("has the bits of the reference: test_noise.py", lambda c: c.verb == "philox_normal"))
# One element; packed tokens; neither a multiple of the chunk, nor of four; more than a segment.
SIZES = ((1,), (3, 8), (65, 64), (2, 3, 1001), (16_385,))
SEEDS = range(3)
pytestmark = pytest.mark.skipif(
    fk.backends()["native"] is not None, reason=str(fk.backends()["native"])
)
every_call = pytest.mark.parametrize("call", CALLS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@every_dtype
@every_call
def test_close_to_float64(call, dtype, poisoned_empty):
    """Of each result, pooled over samples and seeds, at most twice the error of the float32
    reference.
    """
    square = lambda x, y=0.0: float((x.detach().double() - y).square().mean())  # noqa: E731
    for size in SIZES:
        # Of one element each, a few samples would compare the luck of the largest.
        batch = 101 if size == (1,) else 9 if len(size) == 2 else 4
        p = Problem(call, batch, size, dtype)
        errors = []  # of each seed and result: of the kernel, of the reference, its size
        for seed in SEEDS:
            p.renew(seed)
            results = p.run("native"), p.run("reference"), p.double().run("reference")
            for got, plain, true in zip(*results, strict=True):
                assert got.dtype == plain.dtype and got.shape == plain.shape == true.shape
                wide = true.detach().double()  # flags count, too
                errors.append([square(got, wide), square(plain, wide), square(wide)])
            if call.learned:
                _check_direction(got, plain, true)
        ours, theirs, truth = torch.tensor(errors).reshape(len(SEEDS), -1, 3).sum(0).unbind(1)
        floor = truth * torch.finfo(torch.float32).eps ** 2
        assert (ours <= 4 * theirs + floor).all(), (size, ours, theirs, floor)


def _check_direction(got, plain, true):
    """The error of a gradient has no sign, and its direction is that of the truth."""
    about = torch.finfo(got.dtype)
    error, slack = got.double() - true, max(about.eps, 2e-6)
    assert cosine_similarity(got.double().flatten(), true.flatten(), 0) > 1 - slack
    # Below the smallest normal a step is not relative: of its roundings' mean five deviations.
    step = 5 * about.tiny * about.eps / 2 / error.numel() ** 0.5
    assert error.mean().abs() < slack * true.abs().mean() + step
    assert 2 * (plain - true).abs().max() <= max(20 * about.eps, 2e-5) * true.abs().max()


@every_dtype
@every_call
def test_bits_do_not_depend_on_threads_instruction_set_or_batch(call, dtype):
    is_loss = call.verb.endswith("_loss")
    p = Problem(call.but(reduction="none") if is_loss else call, 3, 33_000, dtype)
    whole = p.run("native")
    kernels, threads = native.cpu(), torch.get_num_threads()
    names, widest = ["baseline", "avx2", "avx512"], kernels.isa()
    try:
        for isa, count in [(i, 1) for i in names[: names.index(widest) + 1]] + [(widest, 3)]:
            kernels.use_isa(isa)
            torch.set_num_threads(count)
            assert all(map(torch.equal, p.run("native"), whole)), (isa, count)
    finally:
        kernels.use_isa(widest)
        torch.set_num_threads(threads)
    if call.has("row"):
        return
    parts = []
    for part in (slice(0, 1), slice(1, 3)):
        cut = lambda x, part=part: x[part] if x.shape[:1] == (3,) else x  # noqa: E731
        parts.append(p.changed(cut).run("native"))
    assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), whole))
