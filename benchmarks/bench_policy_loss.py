"""The policy loss, forward and backward, against the formula in plain PyTorch and torch.compile."""

from __future__ import annotations

import torch
from harness import Case, Contender
from rivals import compiled

import flowkern as fk
from flowkern.schedules import sd3_sigmas, step_coefficients

IMAGE = (8, 65_536)


def plain_loss(v, x, x_next, old_log_prob, advantage, a, b, k, c, clip):
    """The published loss: the ratio from recorded log-probabilities."""
    log_prob = (-k * (x_next - (a * x + b * v)) ** 2 + c).mean(1)
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()


def cases(device: torch.device, quick: bool) -> list[Case]:
    g = torch.Generator().manual_seed(0)
    x, old, drift = (torch.randn(IMAGE, generator=g).to(device) for _ in range(3))
    v = (old + 1e-3 * drift).requires_grad_()
    rows = step_coefficients(sd3_sigmas(10), "flow_sde", 0.7)[torch.arange(8)].to(
        device, torch.float32
    )
    key = {"seed": 1, "sample_id": torch.arange(8, device=device), "step": 3}
    x_next, old_log_prob = fk.sde_step(x, old, rows, **key)
    advantage, clip = (
        torch.linspace(-1, 1, 8, device=device),
        1.0,
    )  # nothing is clipped: every row has a gradient

    wide = v.detach().double().requires_grad_()
    truth = fk.policy_loss(
        wide,
        x.double(),
        x_next.double(),
        rows,
        advantage.double(),
        old_velocity=old.double(),
        clip_low=0.99,
        clip_high=clip,
    ).loss
    truth.backward()

    def with_gradient(loss):
        v.grad = None
        loss().backward()
        return (v.grad,)

    columns = [getattr(rows, n).reshape(-1, 1).contiguous() for n in ("a", "b", "k", "c")]
    arguments = (v, x, x_next, old_log_prob, advantage, *columns, clip)
    run = compiled(plain_loss, *arguments)

    def ours():
        return fk.policy_loss(
            v, x, x_next, rows, advantage, old_velocity=old, clip_low=0.99, clip_high=clip
        ).loss

    contenders = [
        Contender(
            "flowkern (reference)",
            lambda: with_gradient(ours),
            "exact difference form; no kernel yet",
        ),
        Contender(
            "eager",
            lambda: with_gradient(lambda: plain_loss(*arguments)),
            "ratio from log-probabilities",
        ),
        Contender("torch.compile", lambda: with_gradient(run), "ratio from log-probabilities"),
    ]
    check = lambda grad: float((grad - wide.grad).abs().max() / wide.grad.abs().max())  # noqa: E731
    moved = (
        9 * x.numel() * 4
    )  # forward: velocity, old, x_t, x_next; backward: the same and the gradient
    return [
        Case(
            "policy_loss",
            "forward + backward, image",
            IMAGE,
            "float32",
            contenders,
            check,
            1e-3,
            moved,
        )
    ]
