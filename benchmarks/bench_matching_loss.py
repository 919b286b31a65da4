"""The matching losses, forward and backward, and the noising that goes before them, against their
formulas in plain PyTorch, eager and compiled.
"""

from __future__ import annotations

import device_time
import torch
from harness import IMAGE, Case, Contender, ours, random_source, rotating, video
from rivals import compiled

import flowkern as fk

CLIP = {"clip_low": 0.9, "clip_high": 9.0}  # nothing is clipped: every row has a gradient
COEFS = {"ref_coef": 1e-3, "ema_coef": 1.0}
WIDE = ("x0", "advantage", "noise", "old_velocity", "velocity_ref", "velocity_ema")


# ---- the rivals: the formulas as a reader of the papers writes them, in float32 ----


def log_likelihood(v, x0, noise, t):
    squares = ((v - (noise - x0)) ** 2).mean(1)
    return -t / 0.25 * ((squares + 1e-10) ** 0.25 - 1e-10**0.25)


def plain_awm(v, x0, noise, t, advantage, old, ref, ema):
    with torch.no_grad():
        old_log_likelihood = log_likelihood(old, x0, noise, t)
    return plain_recorded_awm(v, x0, noise, t, advantage, old_log_likelihood, ref, ema)


def plain_recorded_awm(v, x0, noise, t, advantage, old_log_likelihood, ref, ema):
    """With the old log-likelihood from an earlier call: less to read than we have."""
    ratio = torch.exp(log_likelihood(v, x0, noise, t) - old_log_likelihood)
    clamped = ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
    policy = torch.maximum(-advantage * ratio, -advantage * clamped).mean()
    ref, ema = ((v - ref) ** 2).mean(), ((v - ema) ** 2).mean()
    return policy + COEFS["ref_coef"] * ref + COEFS["ema_coef"] * ema


def plain_nft(v, x0, noise, t, advantage, old):
    """In the space of x0, self-normalized, as published with b = 1."""
    wide = t[:, None]
    x_t = (1 - wide) * x0 + wide * noise
    r = (0.5 + advantage / 2).clamp(0, 1)

    def normalized(velocity):
        error = x_t - wide * velocity - x0
        with torch.no_grad():
            weight = error.abs().mean(1).clamp(min=1e-5)
        return (error**2).mean(1) / weight

    return 5 * (r * normalized(v) + (1 - r) * normalized(2 * old - v)).mean()


def plain_noised(x0, noise, t):
    wide = t[:, None]
    return (1 - wide) * x0 + wide * noise


def plain_noised_anew(x0, t):
    return plain_noised(x0, torch.randn_like(x0), t)


class ReusedBuffers:
    """Eager PyTorch at its best: every intermediate goes to a buffer that is there already."""

    def __init__(self, like):
        self.noise, self.work, self.out = (torch.empty_like(like) for _ in range(3))

    def noised(self, x0, noise, t):
        wide = t[:, None]
        torch.mul(x0, 1 - wide, out=self.out)
        return self.out.add_(torch.mul(noise, wide, out=self.work))

    def noised_anew(self, x0, t):
        return self.noised(x0, self.noise.normal_(), t)


# ---- the cases ----


def cases(device: torch.device, quick: bool) -> list[Case]:
    def of(make, *arguments) -> Case:
        return rotating(make, device, *arguments)

    result = [of(_case, objective, IMAGE) for objective in ("awm", "nft")]
    result += [of(_noised, IMAGE, given) for given in (True, False)]
    if not quick:
        result += [of(_case, objective, IMAGE, torch.bfloat16) for objective in ("awm", "nft")]
        result.append(of(_case, "awm", video(device)))
    if not quick and device_time.applies(device):
        result += [of(_case, "nft", video(device)), of(_case, "awm", video(device), torch.bfloat16)]
        result.append(of(_noised, IMAGE, False, torch.bfloat16))
        for dtype in (torch.float32, torch.bfloat16):
            result.append(of(_noised, video(device), False, dtype))
    return result


def _case(device, objective: str, shape, dtype=torch.float32) -> Case:
    draw = random_source(shape, device, dtype)
    key = {"seed": 1, "sample_id": torch.arange(shape[0], device=device), "step": 3}
    old, x0 = draw(), draw()
    backend = "reference" if device.type == "cuda" else None  # no kernel before its check
    noise = fk.philox_normal(shape, **key, stream="match", backend=backend).to(dtype)
    v = (old + 1e-2 * draw()).requires_grad_()
    sigma = torch.linspace(0.1, 0.9, shape[0], device=device)
    advantage = torch.linspace(-1, 0.9, shape[0], device=device)
    kernel = {"objective": objective, "old_velocity": old} | CLIP
    plain, rest = plain_nft, (old,)
    if objective == "awm":
        ref, ema = draw(), draw()
        kernel |= {"velocity_ref": ref, "velocity_ema": ema} | COEFS
        plain, rest = plain_awm, (old, ref, ema)

    wide = v.detach().double().requires_grad_()
    doubles = kernel | {"x0": x0, "advantage": advantage, "noise": noise}
    doubles = {n: x.double() if n in WIDE else x for n, x in doubles.items()}
    fk.matching_loss(wide, sigma=sigma, **doubles).loss.backward()

    def with_gradient(loss):
        return torch.autograd.grad(loss(), v)

    def run_ours(backend=None, **source):
        options = source | kernel | {"backend": backend}
        return with_gradient(lambda: fk.matching_loss(v, x0, sigma, advantage, **options).loss)

    contenders = ours(device, lambda backend: run_ours(backend, noise=noise), "noise given")
    if dtype == torch.float32:  # elsewhere the noise given is a rounded one
        contenders.append(
            Contender("flowkern, noise drawn again", lambda: run_ours(**key), "from its seed")
        )
        inputs = (v, x0, noise, sigma, advantage)
        run = compiled(plain, *inputs, *rest)
        contenders += [
            Contender("eager", lambda: with_gradient(lambda: plain(*inputs, *rest))),
            Contender("torch.compile", lambda: with_gradient(run)),
        ]
        if objective == "awm":
            recorded = (log_likelihood(old, x0, noise, sigma), ref, ema)
            loss = lambda: plain_recorded_awm(*inputs, *recorded)  # noqa: E731
            note = "the old log-likelihood recorded"
            contenders.append(Contender("eager, recorded", lambda: with_gradient(loss), note))
    check = lambda grad: float((grad - wide.grad).abs().max() / wide.grad.abs().max())  # noqa: E731
    # awm: velocity, x0, noise, old, ref, ema; then the same without old, and the gradient.
    # nft: velocity, x0, noise, old; the same again, and the gradient.
    streams = 12 if objective == "awm" else 9
    size = "image" if shape == IMAGE else "video"
    return Case(
        "matching_loss",
        f"{objective}, forward + backward, {size}",
        shape,
        str(dtype).removeprefix("torch."),
        contenders,
        check,
        1e-5 if dtype == torch.float32 else 1e-2,
        streams * v.numel() * v.element_size(),
    )


def _noised(device, shape, is_given: bool, dtype=torch.float32) -> Case:
    draw = random_source(shape, device, dtype)
    x0, noise = draw(), draw()
    sigma = torch.linspace(0.1, 0.9, shape[0], device=device)
    key = {"seed": 1, "sample_id": torch.arange(shape[0], device=device), "step": 3}
    source = {"noise": noise} if is_given else key
    truth = plain_noised(*(t.double() for t in (x0, noise, sigma)))
    buffers = ReusedBuffers(x0)

    def check_given(x_t):
        return float((x_t - truth).abs().max())

    def check_drawn(x_t):
        """By how many standard errors the noise in x_t is not standard normal."""
        wide = sigma[:, None].double()
        drawn, n = (x_t.double() - (1 - wide) * x0) / wide, x_t.numel()
        in_errors = (drawn.mean() * n**0.5, (drawn.var() - 1) * (n / 2) ** 0.5)
        return max(abs(float(e)) for e in in_errors)

    if is_given:
        plain, reused, rest = plain_noised, buffers.noised, (x0, noise, sigma)
    else:
        plain, reused, rest = plain_noised_anew, buffers.noised_anew, (x0, sigma)
    contenders = ours(device, lambda backend: (fk.add_noise(x0, sigma, **source, backend=backend),))
    if dtype == torch.float32:
        contenders += [
            Contender("eager, buffers reused", lambda: (reused(*rest),)),
            Contender("eager", lambda: (plain(*rest),)),
            Contender("torch.compile", compiled(lambda *t: (plain(*t),), *rest)),
        ]
    if dtype == torch.float32 and not is_given:
        code = compiled(lambda *t: (plain(*t),), *rest, fallback_random=True)
        contenders.append(Contender("torch.compile, fallback_random", code))
    return Case(
        "matching_loss",
        f"add_noise{', noise given' if is_given else ''}, {'image' if shape == IMAGE else 'video'}",
        shape,
        str(dtype).removeprefix("torch."),
        contenders,
        check_given if is_given else check_drawn,
        1e-6 if is_given else 5.0,
        (3 if is_given else 2) * x0.numel() * x0.element_size(),  # x0 and the noise given; x_t
    )
