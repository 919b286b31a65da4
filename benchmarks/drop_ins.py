"""A row of the drop-ins' table: what a script calls today, written out, and what it calls then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Case, Contender
from rivals import compiled
from torch import Tensor

LATENT = (8, 16, 64, 64)  # eight latents of a 512-pixel image


def against(
    name: str,
    drop_in: Callable,
    published: Callable,
    arguments: tuple,
    leaf: int | None = None,
    waits: bool = False,
    loss: Callable = lambda made: made,
) -> Case:
    """`published(*arguments)` in plain PyTorch, eager and compiled, against `drop_in(*arguments)`.

    Both return a tuple of tensors, which are held to the published ones in float64; or with `leaf`
    a loss, of which they are asked the gradient in arguments[leaf].
    drop_in: with the caller's own noise as theirs, or with none of either.
    loss: of what both return, where that is no loss yet: a script's own, which is compiled in none.
    waits: the published function reads from the device, or is called piece by piece: there is no
        one graph to compile.
    """

    def run(function: Callable, given: tuple = arguments) -> tuple[Tensor, ...]:
        made = function(*given)
        return made if leaf is None else torch.autograd.grad(loss(made), given[leaf])

    wide = tuple(map(_doubled, arguments))
    truth = [x.detach() for x in run(published, wide)]

    def check(*outputs: Tensor) -> float:
        """The largest error, of each output's largest value where that is above 1 or, for a
        gradient, whatever it is."""
        pairs = zip(outputs, truth, strict=True)
        floor = 1.0 if leaf is None else 0.0
        return max(float((x - y).abs().max() / y.abs().max().clamp(min=floor)) for x, y in pairs)

    contenders = [
        Contender("flowkern", lambda: run(drop_in)),
        Contender("eager", lambda: run(published), waits=waits),
    ]
    if not waits:
        code = compiled(published, *arguments)
        contenders.append(Contender("torch.compile", lambda: run(lambda *_: code())))
    shape = next(tuple(x.shape) for x in arguments if isinstance(x, Tensor) and x.ndim > 1)
    return Case("compat", name, shape, "float32", contenders, check, 2e-5)


def _doubled(argument):
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return argument
    return argument.detach().double().requires_grad_(argument.requires_grad)
