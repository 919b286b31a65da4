"""The policy loss, forward and backward, against the formula in plain PyTorch and torch.compile."""

from __future__ import annotations

import math

import device_time
import torch
from harness import IMAGE, Case, Contender, ours, random_source, rotating, video
from rivals import compiled

import flowkern as fk
from flowkern.schedules import sd3_sigmas, step_coefficients

CLIP = {"clip_low": 0.99, "clip_high": 1.0}  # nothing is clipped: every row has a gradient


# ---- the rivals: the published loss, the ratio from recorded log-probabilities ----


def plain_loss(v, x, x_next, old_log_prob, advantage, edge):
    a, b, k, c = edge
    log_prob = (-k * (x_next - (a * x + b * v)) ** 2 + c).mean(1)
    ratio = torch.exp(log_prob - old_log_prob)
    low, high = 1 - CLIP["clip_low"], 1 + CLIP["clip_high"]
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high)).mean()


def plain_loss_with_kl(v, x, x_next, old_log_prob, advantage, edge, row, kl):
    """Siblings as the published loops have them: their parent's row, repeated."""
    (a, b, k, c), (v_ref, std, coef) = edge, kl
    v, x, v_ref = v[row], x[row], v_ref[row]
    mean, mean_ref = a * x + b * v, a * x + b * v_ref
    log_prob = (-k * (x_next - mean) ** 2 + c).mean(1)
    ratio = torch.exp(log_prob - old_log_prob)
    low, high = 1 - CLIP["clip_low"], 1 + CLIP["clip_high"]
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high)).mean()
    return policy + coef * ((mean - mean_ref) ** 2 / (2 * std**2)).mean()


# ---- the cases ----


def cases(device: torch.device, quick: bool) -> list[Case]:
    def of(name, shape, **options) -> Case:
        return rotating(_case, device, name, shape, **options)

    off, bf16 = "off policy, image", {"dtype": torch.bfloat16}
    result = [of(off, IMAGE), of("on policy, image", IMAGE, is_on_policy=True)]
    if not quick:
        result += [
            of(off, IMAGE, **bf16),
            of("4 rows of 6 siblings, KL", (4, IMAGE[1]), siblings=6),
        ]
        result.append(of("off policy, video", video(device)))
    if not quick and device_time.applies(device):
        result.append(of("off policy, video", video(device), **bf16))
        for size, shape in (("image", IMAGE), ("video", video(device))):
            for dtype in (torch.float32, torch.bfloat16):
                result.append(of(f"off policy, {size}", shape, dtype=dtype, is_forward=True))
    return result


def _case(
    device, name, shape, dtype=torch.float32, is_on_policy=False, siblings=1, is_forward=False
) -> Case:
    draw = random_source(shape, device, dtype)
    rows, batch = shape[0], shape[0] * siblings
    x, old, drift, ref = (draw() for _ in range(4))
    v = (old if is_on_policy else (old + 1e-3 * drift).to(dtype)).clone().requires_grad_()
    row = torch.arange(rows, device=device).repeat_interleave(siblings)
    table = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[(row % 9).cpu()]
    table = table.to(device, torch.float32)
    key = {"seed": 1, "sample_id": torch.arange(batch, device=device), "step": 3}
    backend = "reference" if device.type == "cuda" else None  # no kernel before its check
    x_next, old_log_prob = fk.sde_step(x[row], old[row], table, **key, backend=backend)
    advantage = torch.linspace(-1, 1, batch, device=device)

    kernel = {"old_velocity": None if is_on_policy else old} | CLIP
    edge = tuple(getattr(table, n).reshape(-1, 1).contiguous() for n in ("a", "b", "k", "c"))
    arguments, plain = (v, x, x_next, old_log_prob, advantage, edge), plain_loss
    if siblings > 1:
        kernel |= {"row": row, "velocity_ref": ref, "kl_coef": 0.04}
        std = table.std.reshape(-1, 1).contiguous()
        arguments, plain = (*arguments, row, (ref, std, 0.04)), plain_loss_with_kl

    wide = v.detach().double().requires_grad_()
    doubles = {n: t.double() if n in WIDE and t is not None else t for n, t in kernel.items()}
    inputs = (x.double(), x_next.double(), table, advantage.double())
    true_loss = fk.policy_loss(wide, *inputs, **doubles).loss
    (truth,) = (true_loss,) if is_forward else torch.autograd.grad(true_loss, wide)

    def with_gradient(loss):
        if is_forward:  # alone: with a gradient to come, it would keep what that needs
            with torch.no_grad():
                return (loss(),)
        return torch.autograd.grad(loss(), v)

    def loss(backend, **change):
        inputs, options = (v, x, x_next, table, advantage), kernel | {"backend": backend} | change
        return with_gradient(lambda: fk.policy_loss(*inputs, **options).loss)

    contenders = ours(device, loss, "exact difference form")
    if dtype == torch.float32:
        note = "ratio from log-probabilities"
        same = {"old_velocity": None, "old_log_prob": old_log_prob}
        contenders.append(Contender("flowkern, same inputs", lambda: loss(None, **same), note))
        run = compiled(plain, *arguments)
        contenders += [
            Contender("eager", lambda: with_gradient(lambda: plain(*arguments)), note),
            Contender("torch.compile", lambda: with_gradient(run), note),
        ]
    largest = 1.0 if is_forward else truth.abs().max()  # the losses of a batch nearly cancel
    check = lambda found: float((found.detach() - truth).abs().max() / largest)  # noqa: E731
    name = f"forward{'' if is_forward else ' + backward'}, {name}"
    case = Case("policy_loss", name, shape, str(dtype).removeprefix("torch."), contenders, check)
    case.allowed = 1e-5 if is_forward else 1e-3 if dtype == torch.float32 else 1e-2
    latents = _latents_moved(rows, siblings, is_on_policy, is_forward, dtype == torch.float32)
    case.bytes_moved = latents * math.prod(shape[1:]) * x.element_size()
    return case


def _latents_moved(
    rows: int, siblings: int, is_on_policy: bool, is_forward: bool, is_float32: bool
) -> int:
    """Each pass reads what it uses, the backward writes one gradient; what is kept instead of
    reading inputs again is written, read and written.
    """
    batch, has_kl = rows * siblings, siblings > 1
    forward = 0 if is_on_policy else rows * (3 + has_kl) + batch
    if is_forward:
        return forward
    if is_float32 and not (is_on_policy or has_kl):
        return forward + 3 * rows
    return forward + rows * (3 + has_kl) + batch


WIDE = ("old_velocity", "velocity_ref")
