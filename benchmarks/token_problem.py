"""The problem that the token losses are timed on, and how others solve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from rivals import compiled
from torch import Tensor

import flowkern as fk

CLIP, KL = 0.2, 0.001


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    budget: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"M={self.tokens} H={self.hidden} V={self.vocabulary} {dtype} budget={self.budget}"


def plain_loss(h, w, ids, old, advantage, token_weight, ref):
    """The loss as it is written, all logits in float32."""
    logits = (h @ w.t()).float()
    lp = torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0]
    ratio = torch.exp(lp - old)
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
    kl = torch.exp(ref - lp) - (ref - lp) - 1
    return (token_weight * (policy + KL * kl)).sum()


class Problem:
    """Tokens of sequences of up to 1,024, an old policy near to this one, and a head."""

    kl_coef = KL

    def __init__(self, shape: Shape, device: torch.device):
        self.shape = shape
        m, hidden, vocabulary, dtype, _ = shape
        g = torch.Generator(device).manual_seed(0)

        def normal(*size):
            return torch.randn(*size, generator=g, device=device)

        self.hidden = normal(m, hidden).to(dtype).requires_grad_()
        self.weight = (2 * normal(vocabulary, hidden) / hidden**0.5).to(dtype).requires_grad_()
        self.ids = torch.randint(vocabulary, (m,), generator=g, device=device)
        with torch.no_grad():
            lp = fk.linear_log_prob(self.hidden, self.weight, self.ids, budget_bytes=shape.budget)
        self.old, self.ref = lp + 0.2 * normal(m), lp + 0.2 * normal(m)
        self.sequence = min(1024, m)
        self.advantage = normal(m // self.sequence).repeat_interleave(self.sequence)
        self.token_weight = torch.full((m,), 1 / m, device=device)

    @property
    def given(self) -> tuple:
        return self.ids, self.old, self.advantage, self.token_weight

    def _made(self, loss: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """(loss, dX, dW) of a call."""

        def run():
            value = loss()
            return value.detach(), *torch.autograd.grad(value, (self.hidden, self.weight))

        return run

    def flowkern(self):
        options = {"ref_log_prob": self.ref, "kl_coef": KL, "budget_bytes": self.shape.budget}
        options |= {"clip_low": CLIP, "clip_high": CLIP}
        return self._made(
            lambda: fk.linear_policy_loss(self.hidden, self.weight, *self.given, **options).loss
        )

    def eager(self):
        return self._made(lambda: plain_loss(self.hidden, self.weight, *self.given, self.ref))

    def compiled(self):
        return self._made(compiled(plain_loss, self.hidden, self.weight, *self.given, self.ref))

    def two_phase(self):
        def loss():
            lp = fk.linear_log_prob(
                self.hidden, self.weight, self.ids, budget_bytes=self.shape.budget
            )
            ratio = torch.exp(lp - self.old)
            policy = torch.maximum(
                -self.advantage * ratio, -self.advantage * ratio.clamp(1 - CLIP, 1 + CLIP)
            )
            kl = torch.exp(self.ref - lp) - (self.ref - lp) - 1
            return (self.token_weight * (policy + KL * kl)).sum()

        return self._made(loss)

    def truth(self) -> tuple[Tensor, ...]:
        """In float64."""
        h, w = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        ids, *others = self.given
        others = [x.double() for x in others]
        out = fk.linear_policy_loss(
            h, w, ids, *others, ref_log_prob=self.ref.double(), kl_coef=KL,
            clip_low=CLIP, clip_high=CLIP, backend="reference",
        )  # fmt: skip
        return out.loss.detach(), *torch.autograd.grad(out.loss, (h, w))

    @staticmethod
    def errors(made: tuple, truth: tuple) -> dict[str, float]:
        """Root mean squares of the gradients' errors, relative, and the loss's error."""
        found = {"loss": float((made[0].double() - truth[0]).abs())}
        for name, x, of in zip(("dX", "dW"), made[1:], truth[1:], strict=True):
            found[name] = float((x.double() - of).norm() / of.norm())
        return found

    @staticmethod
    def apart(made: tuple, others: tuple) -> dict[str, float]:
        """How far two gradients are from each other, relative; row by row, as they are large."""
        found = {}
        for name, x, y in zip(("dX", "dW"), made, others, strict=True):
            rows = zip(x.split(8192), y.split(8192), strict=True)
            parts = [(a.float() - b.float()).norm() for a, b in rows]
            found[name] = float(torch.stack(parts).norm() / y.norm(dtype=torch.float32))
        return found

    def ratio_is_one(self) -> bool:
        budget = {"budget_bytes": self.shape.budget}
        lp = fk.linear_log_prob(self.hidden, self.weight, self.ids, **budget).detach()
        given = (self.ids, lp, self.advantage, self.token_weight)
        out = fk.linear_policy_loss(self.hidden, self.weight, *given, **budget)
        return bool((out.ratio == 1).all()) and torch.equal(out.log_prob, lp)


def liger_loss(problem: Problem, precision: str) -> Callable[[], tuple[Tensor, ...]]:
    """Liger's chunked GRPO loss, a sequence of 1,024 tokens at a time; its gradients' GEMMs are in
    float32, at this precision.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    p = problem
    length = p.sequence
    loss = LigerFusedLinearGRPOLoss(
        beta=KL, loss_type="bnpo", epsilon_low=CLIP, epsilon_high=CLIP, use_ref_model=True
    )
    tall = lambda x: x.view(-1, length)  # noqa: E731
    mask = torch.ones(len(p.ids) // length, length, device=p.ids.device)

    def run():
        kept = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            value, *_ = loss(
                p.hidden.view(*mask.shape, -1), p.weight, tall(p.ids), mask, p.advantage[::length],
                ref_per_token_logps=tall(p.ref), old_per_token_logps=tall(p.old),
            )  # fmt: skip
            return value.detach(), *torch.autograd.grad(value, (p.hidden, p.weight))
        finally:
            torch.set_float32_matmul_precision(kept)

    return run
