"""Guidance that keeps the length of every token: what the pipelines compute, in float64, and the
gradients of both halves. What all ops share is in the table of calls.
"""

import pytest
import torch
from needs import needs_native

import flowkern as fk
from flowkern.ops._common import native

SHAPES = {  # of a latent, and of a token
    "Qwen-Image's": ((16, 6, 10), (2, 2)),
    "Lumina2's": ((1, 4 * 6, 5), (1, 5)),
    "a video's": ((3, 2, 4, 6), (2, 3)),
    "of one channel": ((4, 33), (1, 11)),
    "one": ((40,), (1, 1)),
}
# A bound on relative errors; in 16 bits the gradient is rounded.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float64: 1e-14}
every_shape = pytest.mark.parametrize("shape, patch", SHAPES.values(), ids=SHAPES)


def halves(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [x.to(dtype).requires_grad_() for x in torch.randn(2, 3, *shape, generator=generator)]


def as_the_pipeline(cond, uncond, w, patch):
    """Tokens (B, n, elements), rescaled by the lines of diffusers' Qwen-Image and Lumina2."""
    batch, channels, *rest = cond.shape
    width = rest.pop() if rest else 1
    rows = int(torch.tensor(rest).prod())

    def tokens(x):
        parts = (batch, channels, rows // patch[0], patch[0], width // patch[1], patch[1])
        return x.reshape(parts).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)

    noise_pred, neg_noise_pred = tokens(cond), tokens(uncond)
    comb_pred = neg_noise_pred + w * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    found = comb_pred * (cond_norm / noise_norm)
    parts = (batch, rows // patch[0], width // patch[1], channels, *patch)
    return found.reshape(parts).permute(0, 3, 1, 4, 2, 5).reshape(cond.shape)


@pytest.mark.parametrize("w", [4.0, -1.5, 0.0, 1.0])
@pytest.mark.parametrize("dtype", BOUND)
@every_shape
def test_values_and_both_gradients_are_the_pipelines(shape, patch, dtype, w, backend):
    if dtype == torch.float64 and backend == "native":
        with pytest.raises(fk.BackendError, match="computes in float32"):
            fk.rescaled_guidance(*halves(shape, dtype), w, patch, backend)
        return
    given, wide = halves(shape, dtype), [x.double() for x in halves(shape, dtype)]
    out, truth = fk.rescaled_guidance(*given, w, patch, backend), as_the_pipeline(*wide, w, patch)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    weight = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
    found = torch.autograd.grad(out, given, weight.to(out.dtype))
    expected = torch.autograd.grad(truth, wide, weight.double())
    assert (out - truth).norm() <= 1e-6 * truth.norm()
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype and (x.double() - y).norm() <= BOUND[dtype] * y.norm()


def test_tokens_without_a_length(backend):
    """As the pipeline's: NaN where there is no direction, and 0 where there is no length."""
    (cond, uncond), patch = halves((2, 4, 4)), (2, 2)
    with torch.no_grad():
        cond[0, :, :2, :2] = 0
        cond[1, :, 2:, :2] = uncond[1, :, 2:, :2] = 0
        cond[2], uncond[2] = 1.0, 3.0  # at w = 1.5: 0
    out, expected = (call(cond, uncond, 1.5, patch) for call in (
        lambda *a: fk.rescaled_guidance(*a, backend), as_the_pipeline
    ))  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    nowhere = out.isnan()
    assert nowhere[1, :, 2:, :2].all() and nowhere[2].all() and nowhere.sum() == 8 + 32
    assert (out[0, :, :2, :2] == 0).all()
    for gradient in torch.autograd.grad(out[0].sum(), (cond, uncond)):
        assert (gradient[0, :, :2, :2] == 0).all() and gradient[0].isfinite().all()


def test_each_half_learns_where_it_is_asked_for(backend):
    cond, uncond = halves((16, 4, 4))
    call = lambda *x: fk.rescaled_guidance(*x, 4.0, (2, 2), backend).sin().sum()  # noqa: E731
    expected = torch.autograd.grad(call(cond, uncond), (cond, uncond))
    for learned, one, gradient in (
        (cond, (cond, uncond.detach()), expected[0]),
        (uncond, (cond.detach(), uncond), expected[1]),
    ):
        assert torch.equal(*torch.autograd.grad(call(*one), learned), gradient)
    assert not call(cond.detach(), uncond.detach()).requires_grad
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(cond, uncond), (cond, uncond))
    assert all(map(torch.equal, found, expected))
    if backend == "reference":
        found = torch.func.grad(call, argnums=(0, 1))(cond.detach(), uncond.detach())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert torch.autograd.gradcheck(
            lambda *x: fk.rescaled_guidance(*x, 4.0, (2, 2), backend),
            halves((2, 2, 4), torch.float64),
        )


@needs_native
@every_shape
def test_bits_do_not_depend_on_threads_instruction_set_or_batch(shape, patch):
    given = halves(shape)
    weight = torch.linspace(-1, 2, given[0].numel()).reshape(given[0].shape)

    def run(part=slice(None)):
        out = fk.rescaled_guidance(*given, 4.0, patch, "native")[part]
        inputs = [x[part].detach().requires_grad_() for x in given]
        alone = fk.rescaled_guidance(*inputs, 4.0, patch, "native")
        assert torch.equal(alone, out)
        return alone, *torch.autograd.grad(alone, inputs, weight[part])

    whole, kernels, threads = run(), native.cpu(), torch.get_num_threads()
    names, widest = ["baseline", "avx2", "avx512"], kernels.isa()
    try:
        for isa, count in [(i, 1) for i in names[: names.index(widest) + 1]] + [(widest, 3)]:
            kernels.use_isa(isa)
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(), whole)), (isa, count)
    finally:
        kernels.use_isa(widest)
        torch.set_num_threads(threads)
    parts = [run(part) for part in (slice(0, 1), slice(1, 3))]
    assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), whole))


def test_nothing_is_guided_to_nothing_and_mistakes_are_named(backend):
    for shape in ((0, 4, 2, 2), (2, 4, 0, 2)):
        x = torch.empty(shape, requires_grad=True)
        out = fk.rescaled_guidance(x, x.detach(), 4.0, (1, 1), backend)
        assert out.shape == shape and torch.autograd.grad(out.sum(), x)[0].shape == shape
    cond, uncond = halves((16, 4, 6))
    for change, kind, message in (
        ({"patch": (3, 2)}, ValueError, r"patch: expected what divides 4 x 6, got \(3, 2\)"),
        ({"patch": (0, 2)}, ValueError, "patch: expected what divides"),
        ({"patch": 2}, TypeError, "patch: expected two integers, rows and columns, got 2"),
        ({"patch": (2.0, 2)}, TypeError, "patch: expected two integers"),
        ({"velocity_uncond": None}, TypeError, "velocity_uncond: expected a tensor"),
        ({"velocity_uncond": uncond[:2]}, ValueError, "velocity_uncond: expected shape"),
        ({"guidance_scale": torch.ones(3)}, ValueError, "guidance_scale: expected a finite"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ):
        arguments = {"velocity": cond, "velocity_uncond": uncond, "guidance_scale": 4.0}
        with pytest.raises(kind, match=f"^{message}"):
            fk.rescaled_guidance(**arguments | {"patch": (2, 2), "backend": backend} | change)
