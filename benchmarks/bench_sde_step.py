"""The step against plain PyTorch: draw, replay, and its gradient; images and video."""

from __future__ import annotations

import itertools
import math

import device_time
import torch
from harness import IMAGE, Case, Contender, ours, random_source, rotating, video
from rivals import compiled
from solver_step import third_order

import flowkern as fk
from flowkern.schedules import sd3_sigmas, step_coefficients

# ---- the rivals: the same formula in PyTorch ----


def plain_draw(x, v, a, b, std, k, c):
    mean = a * x + b * v
    x_next = mean + std * torch.randn_like(x)
    return x_next, (-k * (x_next - mean) ** 2 + c).mean(1)


def plain_draw_given(x, v, noise, a, b, std, k, c):
    mean = a * x + b * v
    x_next = mean + std * noise
    return x_next, (-k * (x_next - mean) ** 2 + c).mean(1)


def plain_replay(x, v, x_next, a, b, k, c):
    return (-k * (x_next - (a * x + b * v)) ** 2 + c).mean(1)


def plain_draw_mean(x, v, noise, a, b, std, k, c):
    mean = a * x + b * v
    x_next = mean + std * noise
    return x_next, (-k * (x_next - mean) ** 2 + c).mean(1), mean


def plain_replay_mean(x, v, x_next, a, b, k, c):
    mean = a * x + b * v
    return (-k * (x_next - mean) ** 2 + c).mean(1), mean


def published_draw(x, v, timestep, grid, timesteps, noise_level):
    """The step as Flow-GRPO's scripts call it: edges found by the value of the timestep, sample by
    sample, the coefficients made at every call, and each operation a pass of its own.
    """
    index = [(timesteps == t).nonzero()[0].item() for t in timestep]
    sigma, sigma_next = grid[index].view(-1, 1), grid[[i + 1 for i in index]].view(-1, 1)
    highest, dt = grid[1].item(), sigma_next - sigma
    g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, highest, sigma))) * noise_level
    x, v = x.float(), v.float()
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    std = g * torch.sqrt(-dt)
    x_next = mean + std * torch.randn_like(x)
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return x_next, log_prob.mean(1)


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
        draw = random_source(shape, device, dtype)
        self.x, self.v, self.noise = draw(), draw(), draw()
        steps = torch.arange(shape[0]) % 9
        self.grid = sd3_sigmas(10).to(device, torch.float32)
        self.timesteps = 1000 * self.grid[:-1]
        self.timestep = self.timesteps[steps.to(device)]
        self.edges = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[steps].to(
            device, torch.float32
        )
        column = lambda t: t.reshape(-1, 1).contiguous()  # noqa: E731
        self.a, self.b, self.std, self.k, self.c = (
            column(getattr(self.edges, n)) for n in ("a", "b", "std", "k", "c")
        )
        self.key = {"seed": 1, "sample_id": torch.arange(shape[0], device=device), "step": 3}
        self.out = torch.empty_like(self.x)
        backend = "reference" if device.type == "cuda" else None  # no kernel before its check
        step = fk.sde_step(self.x, self.v, self.edges, **self.key, backend=backend)
        self.x_next, self.log_prob = step

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
    def of(make, shape, dtype=torch.float32) -> Case:
        return rotating(make, shape, dtype, device)

    if device_time.applies(device) and not quick:
        sizes = itertools.product((IMAGE, video(device)), (torch.float32, torch.bfloat16))
        verbs = (_draw, _draw_given, _replay, _replay_gradient, third_order)
        verbs += (_draw_mean, _replay_mean_gradient)
        more = [of(verb, IMAGE) for verb in (_draw_guided, _normals)]
        return [of(verb, *size) for size in sizes for verb in verbs] + more
    verbs = (_draw, _draw_given, _draw_mean, _replay, _replay_gradient, _replay_mean_gradient)
    result = [of(verb, IMAGE) for verb in verbs]
    if not quick:
        result += [of(_draw, IMAGE, torch.bfloat16), of(_replay, IMAGE, torch.bfloat16)]
        result += [of(_draw, video(device)), of(_replay, video(device), torch.bfloat16)]
        result += [of(_draw_guided, IMAGE)]
    result += [of(third_order, IMAGE), of(_normals, IMAGE)]
    return [*result, of(_replay, video(device))]


def _case(name, i: Inputs, contenders, check, streams, reads=()) -> Case:
    size = "image" if i.x.numel() == math.prod(IMAGE) else "video"
    dtype = str(i.x.dtype).removeprefix("torch.")
    moved = streams * i.x.numel() * i.x.element_size()
    case = Case(
        "sde_step", f"{name}, {size}", tuple(i.x.shape), dtype, contenders, check, 2e-5, moved
    )
    if not device_time.applies(i.x.device):  # there reading is as fast as copying
        case.bandwidth, case.reads = "read" if reads else "copy", reads
    return case


def _draw(shape, dtype, device) -> Case:
    i = Inputs(shape, dtype, device)
    scalars, buffers = (i.a, i.b, i.std, i.k, i.c), ReusedBuffers(i.x)
    published = (i.x, i.v, i.timestep, i.grid, i.timesteps, 0.7)
    draw = lambda backend: fk.sde_step(  # noqa: E731
        i.x, i.v, i.edges, **i.key, out=i.out, backend=backend
    )
    contenders = ours(i.x.device, draw)
    if i.x.dtype == torch.float32:
        contenders += [
            Contender("eager, buffers reused", lambda: buffers.draw(i.x, i.v, *scalars)),
            Contender("eager", lambda: plain_draw(i.x, i.v, *scalars)),
            Contender("the published scripts", lambda: published_draw(*published), waits=True),
            Contender("torch.compile", compiled(plain_draw, i.x, i.v, *scalars)),
            Contender(
                "torch.compile, fallback_random",
                compiled(plain_draw, i.x, i.v, *scalars, fallback_random=True),
            ),
        ]
    return _case("draw", i, contenders, i.check_draw, 3)


def _draw_given(shape, dtype, device) -> Case:
    i = Inputs(shape, dtype, device)
    arguments = (i.x, i.v, i.noise, i.a, i.b, i.std, i.k, i.c)
    draw = lambda backend: fk.sde_step(  # noqa: E731
        i.x, i.v, i.edges, noise=i.noise, out=i.out, backend=backend
    )
    contenders = ours(i.x.device, draw)
    if dtype == torch.float32:
        contenders += [
            Contender("eager", lambda: plain_draw_given(*arguments)),
            Contender("torch.compile", compiled(plain_draw_given, *arguments)),
        ]
    return _case("draw, noise given", i, contenders, i.check_draw, 4)


def _replay(shape, dtype, device) -> Case:
    i = Inputs(shape, dtype, device)
    arguments, buffers = (i.x, i.v, i.x_next, i.a, i.b, i.k, i.c), ReusedBuffers(i.x)
    replay = lambda backend: (  # noqa: E731
        fk.sde_log_prob(i.x, i.v, i.x_next, i.edges, backend=backend),
    )
    contenders = ours(i.x.device, replay)
    if i.x.dtype == torch.float32:
        contenders += [
            Contender("eager, buffers reused", lambda: (buffers.replay(*arguments),)),
            Contender("eager", lambda: (plain_replay(*arguments),)),
            Contender("torch.compile", compiled(lambda *t: (plain_replay(*t),), *arguments)),
        ]
    return _case("replay", i, contenders, i.check_replay, 3, (i.x, i.v, i.x_next))


def _replay_gradient(shape, dtype, device) -> Case:
    i = Inputs(shape, dtype, device)
    v = i.v.clone().requires_grad_()
    truth = i.v.double().requires_grad_()
    wide = [t.double() for t in (i.x_next, i.a, i.b, i.k, i.c)]
    plain_replay(i.x.double(), truth, *wide).sum().backward()

    def with_gradient(log_prob):
        return torch.autograd.grad(log_prob().sum(), v)

    arguments = (i.x, v, i.x_next, i.a, i.b, i.k, i.c)
    replay = lambda backend: with_gradient(  # noqa: E731
        lambda: fk.sde_log_prob(i.x, v, i.x_next, i.edges, backend=backend)
    )
    contenders = ours(i.x.device, replay)
    if dtype == torch.float32:
        contenders += [
            Contender("eager", lambda: with_gradient(lambda: plain_replay(*arguments))),
            Contender("torch.compile", _compiled_gradient(with_gradient, arguments)),
        ]
    check = lambda grad: float((grad - truth.grad).abs().max() / truth.grad.abs().max())  # noqa: E731
    case = _case("replay + gradient", i, contenders, check, 7)
    case.allowed = case.allowed if dtype == torch.float32 else 1e-2
    return case


def _draw_mean(shape, dtype, device) -> Case:
    """With the caller's noise, as the drop-ins draw."""
    i = Inputs(shape, dtype, device)
    arguments = (i.x, i.v, i.noise, i.a, i.b, i.std, i.k, i.c)
    draw = lambda backend: fk.sde_step(  # noqa: E731
        i.x, i.v, i.edges, noise=i.noise, out=i.out, return_mean=True, backend=backend
    )
    contenders = ours(i.x.device, draw)
    if dtype == torch.float32:
        contenders += [
            Contender("eager", lambda: plain_draw_mean(*arguments)),
            Contender("torch.compile", compiled(plain_draw_mean, *arguments)),
        ]
    mean_of = i.a.double() * i.x.double() + i.b.double() * i.v.double()

    def check(x_next, log_prob, mean):
        return max(i.check_draw(x_next, log_prob), float((mean - mean_of).abs().max()))

    case = _case("draw with its mean, noise given", i, contenders, check, 4)
    case.bytes_moved += 4 * i.x.numel()  # the mean is float32
    return case


def _replay_mean_gradient(shape, dtype, device) -> Case:
    """Of a log-probability and of a loss of the mean, as one of a KL is."""
    i = Inputs(shape, dtype, device)
    v, truth = i.v.clone().requires_grad_(), i.v.double().requires_grad_()
    wide = [t.double() for t in (i.x_next, i.a, i.b, i.k, i.c)]
    log_prob, mean = plain_replay_mean(i.x.double(), truth, *wide)
    weights = torch.ones_like(i.log_prob), i.noise.float() / i.x[0].numel()
    grads = [w.double() for w in weights]
    torch.autograd.backward((log_prob, mean), grads)

    def with_gradient(replayed):
        return torch.autograd.grad(replayed(), v, weights)

    arguments = (i.x, v, i.x_next, i.a, i.b, i.k, i.c)
    replay = lambda backend: with_gradient(  # noqa: E731
        lambda: fk.sde_log_prob(i.x, v, i.x_next, i.edges, return_mean=True, backend=backend)
    )
    contenders = ours(i.x.device, replay)
    if dtype == torch.float32:
        run = compiled(plain_replay_mean, *arguments)
        contenders += [
            Contender("eager", lambda: with_gradient(lambda: plain_replay_mean(*arguments))),
            Contender("torch.compile", lambda: with_gradient(run)),
        ]
    check = lambda grad: float((grad - truth.grad).abs().max() / truth.grad.abs().max())  # noqa: E731
    case = _case("replay with its mean + both gradients", i, contenders, check, 5)
    case.allowed = case.allowed if dtype == torch.float32 else 1e-2
    case.bytes_moved += 12 * i.x.numel()  # the mean written and read, and its gradient: float32
    return case


def _compiled_gradient(with_gradient, arguments):
    run = compiled(plain_replay, *arguments)
    return lambda: with_gradient(run)


# ---- guided ----

SCALE = 4.0


def plain_guidance(v, uncond):
    return uncond + SCALE * (v - uncond)


def _draw_guided(shape, dtype, device) -> Case:
    i, uncond = Inputs(shape, dtype, device), random_source(shape, device, dtype)()
    more = {"velocity_uncond": uncond, "guidance_scale": SCALE, "out": i.out} | i.key
    draw = lambda backend: fk.sde_step(i.x, i.v, i.edges, **more, backend=backend)  # noqa: E731
    return guided_draw("draw, guided", i, uncond, plain_guidance, draw, 4)


def guided_draw(name, i: Inputs, uncond, guide, draw, streams) -> Case:
    """guide(v, uncond): what PyTorch makes before its draw."""
    scalars = i.a, i.b, i.std, i.k, i.c
    plain = lambda v, uncond, x, *c: plain_draw(x, guide(v, uncond), *c)  # noqa: E731
    given = i.v, uncond, i.x, *scalars
    contenders = ours(i.x.device, draw)
    contenders += [
        Contender("eager", lambda: plain(*given)),
        Contender("torch.compile", compiled(plain, *given)),
        Contender("torch.compile, fallback_random", compiled(plain, *given, fallback_random=True)),
    ]
    truth = Inputs.__new__(Inputs)
    truth.__dict__ |= i.__dict__ | {"v": guide(i.v.double(), uncond.double())}
    return _case(name, i, contenders, truth.check_draw, streams)


# ---- the noise by itself ----


def _normals(shape, dtype, device) -> Case:
    ids, out = torch.arange(shape[0], device=device), torch.empty(shape, device=device)

    def check(normals):
        n = normals.numel()
        moments = (normals.mean() * n**0.5, (normals.var() - 1) * (n / 2) ** 0.5)
        return max(abs(float(m)) for m in moments)  # in standard errors

    contenders = [
        *ours(device, lambda backend: (fk.philox_normal(shape, 1, ids, 3, backend=backend),)),
        Contender("torch.randn", lambda: (torch.randn(shape, device=device),)),
        Contender("torch.randn, buffer reused", lambda: (out.normal_(),)),
    ]
    return Case("noise", "normals", shape, "float32", contenders, check, 5.0, out.numel() * 4)
