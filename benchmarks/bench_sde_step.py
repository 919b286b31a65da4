"""The step against plain PyTorch: draw, replay, and its gradient; images and video."""

from __future__ import annotations

import math

import torch
from harness import Case, Contender
from rivals import compiled

import flowkern as fk
from flowkern.schedules import sd3_sigmas, step_coefficients

IMAGE = (8, 65_536)  # eight latents of a 512-pixel image
VIDEO = (4, 2_096_640)  # four latents of a video


# ---- the rivals: the same formula in PyTorch ----


def plain_draw(x, v, a, b, std, k, c):
    mean = a * x + b * v
    x_next = mean + std * torch.randn_like(x)
    return x_next, (-k * (x_next - mean) ** 2 + c).mean(1)


def plain_replay(x, v, x_next, a, b, k, c):
    return (-k * (x_next - (a * x + b * v)) ** 2 + c).mean(1)


class ReusedBuffers:
    """Eager PyTorch at its best: every intermediate goes to a buffer that is there already."""

    def __init__(self, like):
        self.mean, self.work, self.x_next = (torch.empty_like(like) for _ in range(3))
        self.log_prob = torch.empty(like.shape[0], device=like.device)

    def _mean(self, x, v, a, b):
        torch.mul(x, a, out=self.mean)
        torch.mul(v, b, out=self.work)
        return self.mean.add_(self.work)

    def _log_prob(self, x_next, mean, k, c):
        torch.sub(x_next, mean, out=self.work)
        self.work.square_().mul_(-k).add_(c)
        return torch.mean(self.work, 1, out=self.log_prob)

    def draw(self, x, v, a, b, std, k, c):
        mean = self._mean(x, v, a, b)
        torch.mul(self.work.normal_(), std, out=self.x_next).add_(mean)
        return self.x_next, self._log_prob(self.x_next, mean, k, c)

    def replay(self, x, v, x_next, a, b, k, c):
        return self._log_prob(x_next, self._mean(x, v, a, b), k, c)


# ---- the cases ----


class Inputs:
    def __init__(self, shape, dtype, device):
        g = torch.Generator().manual_seed(0)
        draw = lambda: torch.randn(shape, generator=g).to(device, dtype)  # noqa: E731
        self.x, self.v, self.noise = draw(), draw(), draw()
        steps = torch.arange(shape[0]) % 9
        self.rows = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[steps].to(
            device, torch.float32
        )
        column = lambda t: t.reshape(-1, 1).contiguous()  # noqa: E731
        self.a, self.b, self.std, self.k, self.c = (
            column(getattr(self.rows, n)) for n in ("a", "b", "std", "k", "c")
        )
        self.key = {"seed": 1, "sample_id": torch.arange(shape[0], device=device), "step": 3}
        self.out = torch.empty_like(self.x)
        self.x_next, self.log_prob = fk.sde_step(self.x, self.v, self.rows, **self.key)

    def truth(self, x_next):
        """The log-probability of x_next in float64."""
        wide = [t.double() for t in (self.x, self.v, x_next, self.a, self.b, self.k, self.c)]
        return plain_replay(*wide)

    def check_draw(self, x_next, log_prob):
        """The error of the log-probability; infinite where the noise is not standard normal."""
        noise = (x_next.double() - self.a * self.x.double() - self.b * self.v.double()) / self.std
        n = noise.numel()
        in_errors = (noise.mean() * n**0.5, (noise.var() - 1) * (n / 2) ** 0.5)  # standard errors
        if not all(abs(float(e)) < 5 for e in in_errors):
            return math.inf
        return float((log_prob - self.truth(x_next)).abs().max())

    def check_replay(self, log_prob):
        return float((log_prob - self.truth(self.x_next)).abs().max())


def cases(device: torch.device, quick: bool) -> list[Case]:
    result = [
        _draw(Inputs(IMAGE, torch.float32, device)),
        _draw_given(Inputs(IMAGE, torch.float32, device)),
    ]
    result += [
        _replay(Inputs(IMAGE, torch.float32, device)),
        _replay_gradient(Inputs(IMAGE, torch.float32, device)),
    ]
    if not quick:
        result += [
            _draw(Inputs(IMAGE, torch.bfloat16, device)),
            _replay(Inputs(IMAGE, torch.bfloat16, device)),
        ]
        result += [
            _draw(Inputs(VIDEO, torch.float32, device)),
            _replay(Inputs(VIDEO, torch.bfloat16, device)),
        ]
    return [*result, _replay(Inputs(VIDEO, torch.float32, device))]


def _case(name, i: Inputs, contenders, check, streams, reads=()) -> Case:
    size = "image" if i.x.numel() == math.prod(IMAGE) else "video"
    dtype = str(i.x.dtype).removeprefix("torch.")
    moved = streams * i.x.numel() * i.x.element_size()
    case = Case(
        "sde_step", f"{name}, {size}", tuple(i.x.shape), dtype, contenders, check, 2e-5, moved
    )
    case.bandwidth, case.reads = "read" if reads else "copy", reads
    return case


def _draw(i: Inputs) -> Case:
    scalars, buffers = (i.a, i.b, i.std, i.k, i.c), ReusedBuffers(i.x)
    contenders = [Contender("flowkern", lambda: fk.sde_step(i.x, i.v, i.rows, **i.key, out=i.out))]
    if i.x.dtype == torch.float32:
        contenders += [
            Contender("eager, buffers reused", lambda: buffers.draw(i.x, i.v, *scalars)),
            Contender("eager", lambda: plain_draw(i.x, i.v, *scalars)),
            Contender("torch.compile", compiled(plain_draw, i.x, i.v, *scalars)),
            Contender(
                "torch.compile, fallback_random",
                compiled(plain_draw, i.x, i.v, *scalars, fallback_random=True),
            ),
        ]
    return _case("draw", i, contenders, i.check_draw, 3)


def _draw_given(i: Inputs) -> Case:
    def plain(x, v, noise, a, b, std, k, c):
        mean = a * x + b * v
        x_next = mean + std * noise
        return x_next, (-k * (x_next - mean) ** 2 + c).mean(1)

    arguments = (i.x, i.v, i.noise, i.a, i.b, i.std, i.k, i.c)
    contenders = [
        Contender("flowkern", lambda: fk.sde_step(i.x, i.v, i.rows, noise=i.noise, out=i.out)),
        Contender("eager", lambda: plain(*arguments)),
        Contender("torch.compile", compiled(plain, *arguments)),
    ]
    return _case("draw, noise given", i, contenders, i.check_draw, 4)


def _replay(i: Inputs) -> Case:
    arguments, buffers = (i.x, i.v, i.x_next, i.a, i.b, i.k, i.c), ReusedBuffers(i.x)
    contenders = [Contender("flowkern", lambda: (fk.sde_log_prob(i.x, i.v, i.x_next, i.rows),))]
    if i.x.dtype == torch.float32:
        contenders += [
            Contender("eager, buffers reused", lambda: (buffers.replay(*arguments),)),
            Contender("eager", lambda: (plain_replay(*arguments),)),
            Contender("torch.compile", compiled(lambda *t: (plain_replay(*t),), *arguments)),
        ]
    return _case("replay", i, contenders, i.check_replay, 3, (i.x, i.v, i.x_next))


def _replay_gradient(i: Inputs) -> Case:
    v = i.v.clone().requires_grad_()
    truth = i.v.double().requires_grad_()
    wide = [t.double() for t in (i.x_next, i.a, i.b, i.k, i.c)]
    plain_replay(i.x.double(), truth, *wide).sum().backward()

    def with_gradient(log_prob):
        v.grad = None
        log_prob().sum().backward()
        return (v.grad,)

    arguments = (i.x, v, i.x_next, i.a, i.b, i.k, i.c)
    contenders = [
        Contender(
            "flowkern", lambda: with_gradient(lambda: fk.sde_log_prob(i.x, v, i.x_next, i.rows))
        ),
        Contender("eager", lambda: with_gradient(lambda: plain_replay(*arguments))),
        Contender("torch.compile", _compiled_gradient(with_gradient, arguments)),
    ]
    check = lambda grad: float((grad - truth.grad).abs().max() / truth.grad.abs().max())  # noqa: E731
    return _case("replay + gradient", i, contenders, check, 7)


def _compiled_gradient(with_gradient, arguments):
    run = compiled(plain_replay, *arguments)
    return lambda: with_gradient(run)
