"""Guidance that keeps the length of every token, against plain PyTorch: by itself, with a gradient,
and before a draw.
"""

from __future__ import annotations

import math

import torch
from bench_sde_step import SCALE, Inputs, guided_draw, plain_guidance
from harness import IMAGE, Case, Contender, ours, random_source, rotating
from rivals import compiled

import flowkern as fk

PATCH = (2, 2)
SIDE = math.isqrt(IMAGE[1] // 16)
LATENT = (16, SIDE, SIDE)  # Qwen-Image's: 64 x 64 of 512 x 512 pixels, fewer in a rehearsal


def plain(v, uncond):
    """A token is 2 x 2 places of 16 channels, packed as Qwen-Image's network has it."""
    batch, channels, height, width = v.shape
    parts = (batch, channels, height // 2, 2, width // 2, 2)
    tokens = lambda x: x.view(parts).permute(0, 2, 4, 1, 3, 5).flatten(3)  # noqa: E731
    guided = tokens(plain_guidance(v, uncond))
    guided = guided * (tokens(v).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return guided.unflatten(3, (channels, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(v.shape)


def fused(v, uncond, backend=None):
    return fk.rescaled_guidance(v, uncond, SCALE, PATCH, backend)


def cases(device: torch.device, quick: bool) -> list[Case]:
    verbs = [_guidance] if quick else [_guidance, _gradient, _draw]
    return [rotating(verb, IMAGE, torch.float32, device) for verb in verbs]


def _latents(shape, dtype, device):
    draw = random_source(shape, device, dtype)
    return draw().view(-1, *LATENT), draw().view(-1, *LATENT)


def _case(name, v, contenders, expected, streams) -> Case:
    contenders = [c for c in contenders if c.name != "flowkern, native"]  # on CUDA there is none
    of = lambda found: float((found - expected).abs().max() / expected.abs().max())  # noqa: E731
    name, dtype = f"{name}, image", str(v.dtype).removeprefix("torch.")
    moved = streams * v.numel() * v.element_size()
    return Case("guidance", name, tuple(v.shape), dtype, contenders, of, 2e-6, moved)


def _guidance(shape, dtype, device) -> Case:
    v, uncond = _latents(shape, dtype, device)
    contenders = [
        *ours(device, lambda backend: (fused(v, uncond, backend),)),
        Contender("eager", lambda: (plain(v, uncond),)),
        Contender("torch.compile", compiled(lambda *x: (plain(*x),), v, uncond)),
    ]
    expected = plain(v.double(), uncond.double())
    return _case("guided token by token", v, contenders, expected, 3)


def _gradient(shape, dtype, device) -> Case:
    """Of the conditional half, as where the other one is a constant."""
    (v, uncond), weight = _latents(shape, dtype, device), _latents(shape, dtype, device)[0]
    v = v.requires_grad_()

    def with_gradient(out):
        return torch.autograd.grad(out(), v, weight)

    contenders = [
        *ours(device, lambda backend: with_gradient(lambda: fused(v, uncond, backend))),
        Contender("eager", lambda: with_gradient(lambda: plain(v, uncond))),
        Contender("torch.compile", _compiled_gradient(with_gradient, v, uncond)),
    ]
    truth = v.detach().double().requires_grad_()
    out = plain(truth, uncond.double())
    (expected,) = torch.autograd.grad(out, truth, weight.double())
    return _case("guided token by token + gradient", v, contenders, expected, 7)


def _compiled_gradient(with_gradient, *arguments):
    run = compiled(plain, *arguments)
    return lambda: with_gradient(run)


def _draw(shape, dtype, device) -> Case:
    """In two passes: the row "draw, guided" is what one could not pass."""
    i, uncond = Inputs(shape, dtype, device), random_source(shape, device, dtype)()
    flat = lambda guide: lambda *x: guide(*(y.view(-1, *LATENT) for y in x)).view(shape)  # noqa: E731

    def draw(backend):
        v = flat(fused)(i.v, uncond)
        return fk.sde_step(i.x, v, i.edges, **i.key, out=i.out, backend=backend)

    return guided_draw("draw, guided token by token", i, uncond, flat(plain), draw, 6)
